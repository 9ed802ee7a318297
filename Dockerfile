# Longreach as a container: the server, with PyTorch for the CPU. UNTESTED: no container engine was at hand when it was written.
#
#   docker build -t longreach .
#   docker run -p 8000:8000 -v ~/.longreach:/data -v $PWD/runs:/runs longreach serve /runs/quickstart --host 0.0.0.0
#
# The server listens for other machines only if it has keys:
#   docker run -v ~/.longreach:/data longreach keys add laptop
FROM python:3.12-slim

# The compiler builds the C layers on first use; their result is kept below /data.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY longreach ./longreach
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/cpu '.[server,postgres]'

RUN useradd --create-home longreach && mkdir /data && chown longreach /data
USER longreach
ENV HOME=/data XDG_CACHE_HOME=/data/cache
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready')"
ENTRYPOINT ["longreach"]
CMD ["serve", "/runs/model", "--host", "0.0.0.0"]
