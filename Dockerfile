# pe-app on a CPU: docker build -t pe-app . && docker run --rm -v "$PWD:/data" pe-app detect /data/scan
FROM python:3.11-slim
RUN pip install --no-cache-dir torch --index-url https://download.pytorch.org/whl/cpu
COPY . /src
RUN pip install --no-cache-dir "/src[server,dicom]" -c /src/constraints.txt && rm -rf /src
RUN useradd --create-home reader && mkdir /data && chown reader /data
USER reader
WORKDIR /data
EXPOSE 8000
ENTRYPOINT ["pe-app"]
CMD ["--help"]
