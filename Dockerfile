# docker build --tag lilliput .
# docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD:/work" lilliput shrink mine.py:network --floor 1% --budget 5m
FROM python:3.13-slim

# The engine compiles its C with gcc.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# torch first and alone: the largest layer, which changes least. The builds of this index have no CUDA libraries.
COPY constraints.txt /src/
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --no-cache-dir --extra-index-url "$TORCH_INDEX" --constraint /src/constraints.txt torch

COPY pyproject.toml README.md LICENSE /src/
COPY src /src/src
RUN pip install --no-cache-dir --constraint /src/constraints.txt "/src[report]"

# A user of the host has no name and no home in here.
ENV HOME=/tmp USER=lilliput LILLIPUT_CACHE=/tmp/lilliput
WORKDIR /work
ENTRYPOINT ["lilliput"]
CMD ["--help"]
