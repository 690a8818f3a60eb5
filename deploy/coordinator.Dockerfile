# docker build -f deploy/coordinator.Dockerfile -t fed-tat-coordinator .      (in the repository's root)
FROM python:3.12-slim-bookworm
RUN apt-get update \
  && apt-get install --yes --no-install-recommends nginx-light \
  && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/fed-tat fed-tat
WORKDIR /opt/fed-tat
COPY . .
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu --constraint constraints.txt .
USER fed-tat
WORKDIR /var/lib/fed-tat
VOLUME /var/lib/fed-tat
EXPOSE 8443
STOPSIGNAL SIGTERM
ENTRYPOINT ["tat", "coordinator", "up", "--config", "/var/lib/fed-tat/coordinator.yaml"]
