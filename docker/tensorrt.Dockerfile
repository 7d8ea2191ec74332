# lpd-export for an NVIDIA GPU: docker build -f docker/tensorrt.Dockerfile -t lpd-export:tensorrt .
ARG RELEASE=25.12
FROM nvcr.io/nvidia/tensorrt:${RELEASE}-py3
# TensorRT 11, where the image's is older; an image that has it needs serve alone.
ARG EXTRAS=serve,tensorrt
COPY . /src
WORKDIR /src
RUN pip install --no-cache-dir --break-system-packages --constraint requirements.lock ".[${EXTRAS}]" \
    && rm -rf /src/* \
    && useradd --create-home --uid 10001 lpd
USER 10001
WORKDIR /home/lpd
EXPOSE 8000
HEALTHCHECK --start-period=120s CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["lpd-export"]
CMD ["serve", "/bundle", "--host", "0.0.0.0"]
