# recover on the CPU; for an NVIDIA GPU build with --build-arg TORCH=torch==2.13.0 and run with --gpus all.
#   docker build -t recover .
#   docker run --rm -v "$PWD:/work" recover                                      # the quickstart, into ./checkpoints
#   docker run --rm -v "$PWD:/work" recover run my.yaml
# Programs that a model writes (HumanEval, MBPP) need Linux namespaces, which containers forbid unless asked:
#   docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN ...
FROM python:3.11-slim

# gcc and the C headers are what Triton compiles its launchers with; make installs as on any machine.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/recover
COPY pyproject.toml constraints.txt Makefile README.md LICENSE ./
COPY recover recover
COPY recipes recipes
COPY launch launch
ARG TORCH="--extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu"
RUN make install VENV=/opt/venv TORCH="${TORCH}"

# Models and data that are fetched lie below HOME: mount a volume there to keep them.
RUN useradd --create-home --uid 1000 user && mkdir /work && chown 1000 /work
USER 1000
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /work
ENTRYPOINT ["recover"]
CMD ["quickstart"]
