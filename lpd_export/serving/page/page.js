// The page of `lpd-export serve`: settings, images as their steps fill in, a mask to paint, a gallery.
// Whatever comes from a server or a person enters the page as text, never as HTML.

const SPECTRUM = [[46, 30, 105], [42, 92, 158], [28, 146, 150], [104, 192, 110], [247, 222, 92]];
const SMALL = 256; // pixels: below, images are enlarged without smoothing
const NUMBERS = ["cfg", "temperature", "steps", "seed", "top_k", "top_p"];

const find = (selector, root = document) => root.querySelector(selector);
const models = new Map();
const lanes = [];
let running = null; // an AbortController while images are made
let editing = null; // the picture that is edited, and its mask

// ------------------------------------------------------------------------------------- the server

class Refused extends Error {}

function headers() {
  const key = find("#key").value.trim();
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  if (answer.status === 401) find("#access").open = true;
  throw new Refused(told?.error?.message ?? `the server answered with ${answer.status}`);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = "", part; !(part = await reader.read()).done;) {
    const whole = (held + part.value).split("\n\n");
    held = whole.pop();
    for (const event of whole) yield JSON.parse(event.slice(event.indexOf("\ndata: ") + 7));
  }
}

async function loadModels() {
  try {
    const { data } = await (await ask("/v1/models")).json();
    for (const { id } of data) {
      models.set(id, await (await ask(`/v1/models/${encodeURIComponent(id)}`)).json());
    }
    while ((await fetch("/ready")).status !== 200) await new Promise((go) => setTimeout(go, 300));
    find("#state").textContent = "Ready";
    if (!lanes.length) addLane();
  } catch (error) {
    find("#state").textContent = error.message;
  }
}

// ---------------------------------------------------------------------------------- lanes of settings

class Lane {
  constructor(number) {
    const section = find("#lane").content.cloneNode(true).firstElementChild;
    this.section = section;
    this.settings = find("fieldset", section);
    find("legend", section).textContent = number ? "Compared with" : "Settings";
    const list = find("datalist", section);
    list.id = `classes-${number}`;
    this.field("prompt").setAttribute("list", list.id);
    for (const id of models.keys()) this.field("model").add(new Option(id, id));
    this.field("model").addEventListener("change", () => this.chooseModel());
    find(".step", section).addEventListener("input", (event) => this.show(event.target.value - 1));
    this.frames = [];
    this.chooseModel();
    find("#lanes").append(section);
  }

  field(name) {
    return this.settings.elements.namedItem(name);
  }

  get model() {
    return models.get(this.field("model").value);
  }

  chooseModel() {
    const { class_names: names, classes, cfg, steps, grid } = this.model;
    const options = names.map(([name, ...others], id) => {
      const option = document.createElement("option");
      option.value = name;
      option.label = [name, ...others].join(", ") + ` (${id})`;
      return option;
    });
    find("datalist", this.section).replaceChildren(...options, new Option("no class", "none"));
    this.field("prompt").placeholder = names.length ? "search" : `0 to ${classes - 1}, or none`;
    this.field("prompt").value ||= names[0]?.[0] ?? "0";
    this.field("cfg").value = cfg;
    this.field("steps").value = steps;
    this.field("steps").max = grid * grid;
    find(".image", this.section).hidden = true;
    find(".step", this.section).disabled = true;
    this.drawGrid(null);
  }

  // What the API is asked for; what the model decides by itself is left out.
  request() {
    const asked = {};
    for (const { name, value, type } of this.settings.elements) {
      if (!name || type === "checkbox" || value === "") continue;
      asked[name] = NUMBERS.includes(name) ? Number(value) : value;
    }
    const { steps, order } = this.model;
    if (asked.steps === steps) delete asked.steps;
    if (asked.order === order) delete asked.order;
    return asked;
  }

  use(asked) {
    if (asked.model !== this.field("model").value) {
      this.field("model").value = asked.model;
      this.chooseModel();
    }
    const { steps, cfg } = this.model;
    for (const name of ["prompt", "cfg", "temperature", "steps", "order", "seed", "guidance", "top_k", "top_p"]) {
      this.field(name).value = asked[name] ?? { steps, cfg }[name] ?? "";
    }
  }

  async run(signal, edit) {
    if (this.field("again").checked) this.field("seed").value = Math.floor(Math.random() * 2 ** 32);
    const asked = this.request();
    if (edit && asked.order && asked.order !== "random") delete asked.order;
    const steps = asked.steps ?? this.model.steps;
    const extra = { stream: true, partial_images: steps - 1, details: true };
    const began = performance.now();
    this.frames = [];
    this.tell("Waiting for a place in a batch", "");
    try {
      const answer = edit
        ? await ask("/v1/images/edits", { method: "POST", body: form({ ...asked, ...extra }, edit), signal })
        : await ask("/v1/images/generations", {
            method: "POST",
            body: JSON.stringify({ ...asked, ...extra }),
            headers: { "Content-Type": "application/json" },
            signal,
          });
      for await (const event of events(answer)) {
        if (event.error) throw new Refused(event.error.message);
        const step = event.step ?? steps;
        const whole = event.type.endsWith(".completed");
        this.frames.push({ step, source: `data:image/png;base64,${event.b64_json}`, cells: event.step_of_cell });
        this.show(this.frames.length - 1);
        const seconds = ((performance.now() - began) / 1000).toFixed(2);
        this.tell(whole ? `${event.class_name}, seed ${event.seed}: ${steps} steps in ${seconds} s`
          : `Step ${step} of ${steps}`, "");
        if (whole) addCard(this, asked, event, edit);
      }
    } catch (error) {
      if (error.name === "AbortError") this.tell("Stopped", "");
      else this.tell("", error.message);
    }
  }

  tell(said, wrong) {
    find(".told", this.section).textContent = said;
    find(".wrong", this.section).textContent = wrong;
  }

  show(number) {
    const frame = this.frames[number];
    const image = find(".image", this.section);
    image.src = frame.source;
    image.hidden = false;
    image.alt = `${this.field("prompt").value} after step ${frame.step}`;
    image.classList.toggle("small", this.model.resolution < SMALL);
    const step = find(".step", this.section);
    step.max = this.frames.length;
    step.value = number + 1;
    step.disabled = this.frames.length < 2;
    step.setAttribute("aria-valuetext", `step ${frame.step}`);
    this.drawGrid(frame.cells, frame.step);
  }

  // The cells coloured by their step, those of later steps faint; kept ones grey.
  drawGrid(cells, step) {
    const canvas = find(".grid", this.section);
    const pen = canvas.getContext("2d");
    const { grid } = this.model;
    const side = canvas.width / grid;
    pen.clearRect(0, 0, canvas.width, canvas.height);
    canvas.setAttribute("aria-label", "No schedule yet");
    if (!cells) return;
    const last = Math.max(...cells);
    cells.forEach((own, cell) => {
      pen.globalAlpha = own < step ? 1 : 0.15;
      pen.fillStyle = own < 0 ? "#9aa0aa" : colour(last ? own / last : 0);
      pen.fillRect((cell % grid) * side, Math.floor(cell / grid) * side, side - 1, side - 1);
    });
    pen.globalAlpha = 1;
    canvas.setAttribute("aria-label", `Schedule: ${grid} by ${grid} cells in ${last + 1} steps, dark to ` +
      `light; ${cells.filter((own) => own < step).length} are filled after step ${step}`);
  }
}

function colour(share) {
  const place = share * (SPECTRUM.length - 1);
  const from = Math.min(Math.floor(place), SPECTRUM.length - 2);
  const mixed = SPECTRUM[from].map((low, i) => low + (place - from) * (SPECTRUM[from + 1][i] - low));
  return `rgb(${mixed.map(Math.round).join(" ")})`;
}

function form(asked, edit) {
  const body = new FormData();
  for (const [name, value] of Object.entries(asked)) body.append(name, String(value));
  body.append("image", edit.file, "image.png");
  body.append("mask", edit.mask, "mask.png");
  return body;
}

function addLane() {
  const lane = new Lane(lanes.length);
  lanes.push(lane);
  return lane;
}

async function runLanes(edit) {
  running?.abort();
  const own = running = new AbortController();
  find("#stop").disabled = false;
  await Promise.all(lanes.map((lane) => lane.run(own.signal, edit)));
  if (running === own) find("#stop").disabled = true;
}

// -------------------------------------------------------------------------------------- the editor

class Mask {
  constructor(picture, file, lane) {
    this.picture = picture;
    this.file = file;
    this.lane = lane;
    this.grid = lane.model.grid;
    this.cells = new Array(this.grid ** 2).fill(false);
    this.cursor = null;
    this.draw();
  }

  draw() {
    const canvas = find("#mask");
    const pen = canvas.getContext("2d");
    const side = canvas.width / this.grid;
    const { naturalWidth: width, naturalHeight: height } = this.picture;
    const square = Math.min(width, height); // the middle, as the server takes it
    pen.imageSmoothingEnabled = square >= SMALL;
    pen.drawImage(this.picture, (width - square) / 2, (height - square) / 2, square, square,
      0, 0, canvas.width, canvas.height);
    this.cells.forEach((on, cell) => {
      if (!on) return;
      const [left, top] = [(cell % this.grid) * side, Math.floor(cell / this.grid) * side];
      pen.fillStyle = "rgb(230 232 237 / 80%)";
      pen.fillRect(left, top, side, side);
      pen.lineWidth = 2; // hatched, to be seen on any colour
      pen.strokeStyle = "rgb(27 95 174)";
      pen.beginPath();
      for (const [from, to] of [[0, 1], [0.5, 1.5], [-0.5, 0.5]]) {
        pen.moveTo(left + Math.max(from, 0) * side, top + Math.min(to, 1) * side);
        pen.lineTo(left + Math.min(to, 1) * side, top + Math.max(from, 0) * side);
      }
      pen.stroke();
    });
    if (this.cursor !== null) {
      pen.lineWidth = 3;
      pen.strokeStyle = "#fff";
      pen.strokeRect((this.cursor % this.grid) * side, Math.floor(this.cursor / this.grid) * side, side, side);
      pen.lineWidth = 1;
      pen.strokeStyle = "#000";
      pen.strokeRect((this.cursor % this.grid) * side, Math.floor(this.cursor / this.grid) * side, side, side);
    }
    const painted = this.cells.filter(Boolean).length;
    find("#mask-state").textContent = `${painted} of ${this.cells.length} cells are painted`;
    find("#apply").disabled = !painted;
  }

  // Paints around a place, from 0 to 1 in both directions.
  paint(right, down) {
    const brush = Number(find("#brush").value) / 2;
    const on = !find("#erase").checked;
    this.cells.forEach((_, cell) => {
      const far = Math.hypot((cell % this.grid) + 0.5 - right * this.grid,
        Math.floor(cell / this.grid) + 0.5 - down * this.grid);
      if (far <= brush) this.cells[cell] = on;
    });
    const own = Math.min(Math.floor(down * this.grid), this.grid - 1) * this.grid
      + Math.min(Math.floor(right * this.grid), this.grid - 1);
    if (own >= 0) this.cells[own] = on;
    this.draw();
  }

  move(right, down) {
    const cursor = this.cursor ?? 0;
    const x = Math.min(Math.max((cursor % this.grid) + right, 0), this.grid - 1);
    const y = Math.min(Math.max(Math.floor(cursor / this.grid) + down, 0), this.grid - 1);
    this.cursor = this.cursor === null ? 0 : y * this.grid + x;
    this.draw();
  }

  // A picture of a pixel a cell, white where it is painted.
  async blob() {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = this.grid;
    const pen = canvas.getContext("2d");
    pen.fillRect(0, 0, this.grid, this.grid);
    pen.fillStyle = "#fff";
    this.cells.forEach((on, cell) => on && pen.fillRect(cell % this.grid, Math.floor(cell / this.grid), 1, 1));
    return new Promise((done) => canvas.toBlob(done, "image/png"));
  }
}

async function openEditor(file, lane = lanes[0]) {
  const picture = new Image();
  picture.src = URL.createObjectURL(file);
  try {
    await picture.decode();
  } catch {
    lane.tell("", `${file.name ?? "the file"} is not a picture that this browser can show`);
    return;
  }
  find("#editor").hidden = false;
  editing = new Mask(picture, file, lane);
  find("#mask").focus();
  find("#editor").scrollIntoView({ block: "nearest" });
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function listenToMask(canvas) {
  const paint = (event) => {
    const box = canvas.getBoundingClientRect();
    editing.paint((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    paint(event);
  });
  canvas.addEventListener("pointermove", (event) => event.buttons && paint(event));
  canvas.addEventListener("keydown", (event) => {
    if (event.key in ARROWS) editing.move(...ARROWS[event.key]);
    else if (event.key === " ") {
      editing.cursor ??= 0;
      editing.cells[editing.cursor] = !editing.cells[editing.cursor];
      editing.draw();
    } else return;
    event.preventDefault();
  });
}

// ------------------------------------------------------------------------------------- the gallery

const quoted = (text) => `'${String(text).replaceAll("'", "'\\''")}'`;

function commandOf(asked, model, edited) {
  const bundle = quoted(`engines/${asked.model}`);
  const words = [];
  const steps = asked.steps ?? model.steps;
  let schedule = "";
  if (asked.steps || (asked.order && !edited)) {
    const kind = (!edited && asked.order) || (model.order === "foreign" ? "locality" : model.order);
    schedule = `lpd-export schedule make --res ${model.resolution} --stride ${model.resolution / model.grid} ` +
      `--steps ${steps} --kind ${kind} --out schedule.npz && `;
    words.push("--schedule schedule.npz");
  }
  if (edited && asked.order) words.push(`--order ${asked.order}`);
  for (const name of ["seed", "cfg", "guidance", "temperature", "top_k", "top_p"]) {
    if (name in asked) words.push(`--${name.replace("_", "-")} ${asked[name]}`);
  }
  const what = edited ? `edit ${bundle} image.png --mask mask.png` : `run ${bundle}`;
  return `${schedule}lpd-export ${what} --class ${quoted(asked.prompt)} ${words.join(" ")} --out images`;
}

function curlOf(asked, edited) {
  const key = find("#key").value ? ` -H "Authorization: Bearer $KEY"` : "";
  if (!edited) {
    return `curl ${location.origin}/v1/images/generations${key} --json ${quoted(JSON.stringify(asked))}`;
  }
  const fields = Object.entries(asked).map(([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`);
  return `curl ${location.origin}/v1/images/edits${key} -F image=@image.png -F mask=@mask.png ${fields.join(" ")}`;
}

function addCard(lane, request, made, edit) {
  const asked = { ...request, seed: made.seed };
  const model = lane.model;
  const card = find("#card").content.cloneNode(true).firstElementChild;
  const source = `data:image/png;base64,${made.b64_json}`;
  const about = Object.entries(asked).filter(([name]) => !["model", "prompt"].includes(name));
  const picture = find("img", card);
  picture.src = source;
  picture.alt = made.class_name;
  picture.classList.toggle("small", model.resolution < SMALL);
  find("p", card).textContent =
    `${edit ? "Edit: " : ""}${made.class_name}, ${asked.model}, ${about.map((pair) => pair.join(" ")).join(", ")}`;
  const link = (name, href) => {
    const anchor = find(`[data-do=${name}]`, card);
    anchor.href = href;
    anchor.hidden = false;
  };
  link("image", edit ? URL.createObjectURL(edit.file) : source);
  if (edit) link("mask", URL.createObjectURL(edit.mask));
  card.addEventListener("click", ({ target }) => {
    const what = target.dataset.do;
    if (what === "use") {
      lanes[0].use(asked);
      lanes[0].field("prompt").focus();
    } else if (what === "edit") {
      lanes[0].use(asked);
      const bytes = Uint8Array.from(atob(made.b64_json), (letter) => letter.charCodeAt(0));
      openEditor(new Blob([bytes], { type: "image/png" }));
    } else if (what === "command" || what === "curl") {
      copy(card, target, what === "curl" ? curlOf(asked, edit) : commandOf(asked, model, edit));
    }
  });
  find("#empty").hidden = true;
  find("#gallery").prepend(card);
}

async function copy(card, button, text) {
  const shown = find("textarea", card);
  shown.value = text;
  shown.hidden = false;
  shown.select(); // to be copied by hand where a page may not
  button.dataset.says ??= button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = button.dataset.says), 1500);
  } catch {
    shown.focus();
  }
}

// ------------------------------------------------------------------------------------ the buttons

find("#request").addEventListener("submit", (event) => {
  event.preventDefault();
  if (lanes.length) runLanes(null);
});
find("#stop").addEventListener("click", () => running?.abort());
find("#compare").addEventListener("click", ({ target }) => {
  if (!lanes.length) return;
  if (lanes.length === 1) addLane().use(lanes[0].request());
  else lanes.pop().section.remove();
  target.setAttribute("aria-pressed", String(lanes.length === 2));
});
find("#file").addEventListener("change", ({ target }) => {
  if (target.files[0] && lanes.length) openEditor(target.files[0]);
  target.value = "";
});
find("#clear").addEventListener("click", () => {
  editing.cells.fill(false);
  editing.draw();
});
find("#invert").addEventListener("click", () => {
  editing.cells = editing.cells.map((on) => !on);
  editing.draw();
});
find("#close").addEventListener("click", () => {
  find("#editor").hidden = true;
  find("#generate").focus();
});
find("#apply").addEventListener("click", async () => {
  const edit = { file: editing.file, mask: await editing.blob() };
  find("#lanes").scrollIntoView({ block: "nearest" });
  runLanes(edit);
});
find("#key").addEventListener("change", loadModels);
listenToMask(find("#mask"));
loadModels();
