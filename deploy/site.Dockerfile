# docker build -f deploy/site.Dockerfile -t fed-tat-site .      (in the repository's root)
# The plain torch wheel brings CUDA; a hospital without a GPU adds --build-arg INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.12-slim-bookworm
ARG INDEX=https://pypi.org/simple
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/fed-tat fed-tat
WORKDIR /opt/fed-tat
COPY . .
RUN pip install --no-cache-dir --extra-index-url ${INDEX} --constraint constraints.txt .
USER fed-tat
WORKDIR /var/lib/fed-tat
VOLUME /var/lib/fed-tat
STOPSIGNAL SIGTERM
ENTRYPOINT ["flower-client", "--site", "/var/lib/fed-tat/site.yaml"]
