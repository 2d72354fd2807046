"""An S3 server of this process, for tests; other processes of this machine may ask it, too."""

import contextlib
import urllib.request

import boto3
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


@contextlib.contextmanager
def s3_server(bucket):
    """Yields what an address needs behind it to reach the server: `s3://bucket/path?` + this."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    # what an earlier server of this process held, this one would hold, too
    urllib.request.urlopen(
        urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")
    ).close()
    client = boto3.client(
        "s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1",
        aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"], aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
    )  # fmt: skip
    client.create_bucket(Bucket=bucket)
    try:
        yield f"scheme=http&endpoint_override={host}%3A{port}&region=us-east-1"
    finally:
        server.stop()
