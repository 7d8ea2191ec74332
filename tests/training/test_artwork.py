"""What drawings are of: the spelling of concepts, the classes, and what is held out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.artwork import (
    SKIN_TONE,
    ArtworkClass,
    class_of,
    concept_name,
    drawings,
    family,
    held_out,
    read_classes,
    render,
    subgroups,
)


@pytest.mark.parametrize(
    ("name", "concept"),
    [
        ("woman\N{RIGHT SINGLE QUOTATION MARK}s hat", "womans-hat"),
        ("flag: Côte d\N{RIGHT SINGLE QUOTATION MARK}Ivoire", "flag-cote-divoire"),
        ("flag-for-flag-peru", "flag-peru"),
        ("flag-for-peru", "flag-peru"),
        ("keycap: *", "keycap"),
    ],
)
def test_names_become_concepts(name: str, concept: str) -> None:
    assert concept_name(name) == concept


def test_skin_tones_are_no_concepts() -> None:
    assert SKIN_TONE.search("artist-medium-dark")
    assert SKIN_TONE.search("waving-hand-light-skin-tone")
    assert SKIN_TONE.search("man-elf-tone3")
    assert not SKIN_TONE.search("light-rail")
    entries = [
        {"name": "artist", "subgroup": "person-role"},
        {"name": "artist: dark skin tone", "subgroup": "person-role"},
        {"name": "red hair", "subgroup": "hair-style"},
    ]
    assert subgroups(entries) == {"artist": "person-role"}


def test_classes_take_subgroups_names_and_patterns() -> None:
    classes = {
        "cat": ArtworkClass(("cat-face/", "cat", "!crying-*")),
        "dog": ArtworkClass(("dog*",)),
    }
    assert class_of(classes, "grinning-cat", "cat-face") == "cat"
    assert class_of(classes, "crying-cat", "cat-face") is None
    assert class_of(classes, "dog-face", "") == "dog"
    assert class_of(classes, "hot-dog", "") is None
    with pytest.raises(ValueError, match="cat is in two classes: cat and pet"):
        class_of({**classes, "pet": ArtworkClass(("?at",))}, "cat", "")


def test_the_classes_are_those_of_the_file() -> None:
    classes = read_classes()
    assert list(classes) == sorted(classes)
    assert 55 <= len(classes) <= 65
    assert classes["heart"].mirror
    assert not classes["letter"].mirror
    assert classes["flag"].not_by == ("emojione",)


CONCEPTS = st.dictionaries(
    st.builds(
        lambda who, what, way: who + what + way,
        st.sampled_from(["man-", "woman-", "person-", ""]),
        st.integers(0, 60).map("thing{}".format),
        st.sampled_from(["", "-facing-right"]),
    ),
    st.sampled_from(["one", "other", None]),
    max_size=80,
)


@given(CONCEPTS)
def test_held_out_families_are_whole_and_of_every_class(concepts: dict[str, str | None]) -> None:
    chosen = held_out(concepts)
    families = {family(concept) for concept in chosen}
    assert chosen == {concept for concept in concepts if family(concept) in families}
    assert held_out(dict(reversed(concepts.items()))) == chosen
    for name in {name for name in concepts.values() if name}:
        assert any(concepts[concept] == name for concept in chosen)


def test_what_is_held_out_never_changes() -> None:
    concepts: dict[str, str | None] = {f"thing-{number}": "things" for number in range(50)}
    concepts |= {f"{who}-running": "runners" for who in ("man", "woman", "person")}
    concepts |= {"jogger": "runners", "running": None}
    assert held_out(concepts) == {"jogger", "thing-24", "thing-6", "thing-8"}


def test_a_drawing_is_rendered_on_white_as_its_box_says() -> None:
    icons = {
        "width": 32,
        "height": 32,
        "icons": {
            "Half": {"body": '<path fill="#d61e54" d="M0 0h16v32H0z"/>'},
            "moved": {
                "body": '<path fill="#d61e54" d="M8 0h8v16H8z"/>',
                "left": 8,
                "width": 16,
                "height": 16,
            },
        },
    }
    documents = dict(drawings(icons))
    assert list(documents) == ["half", "moved"]
    for svg in documents.values():
        pixels = np.asarray(render(svg))
        assert pixels.shape == (64, 64, 3)
        assert (pixels[:, :32] == (214, 30, 84)).all()
        assert (pixels[:, 32:] == 255).all()
