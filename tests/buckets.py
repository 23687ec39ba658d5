"""An S3 server for tests: moto's, which answers real requests over HTTP.

It honours `If-None-Match: *` on PutObject (412 where the object is there), and on multipart completion. It looks and
then puts, which is not one step as in S3: what happens at the same instant cannot be tested against it, what happens
one after the other can. It knows no 409 (two conditional puts under way).
"""

import os
import uuid
from collections.abc import Iterator

import pytest
from skips import skip

try:
    import boto3
    from moto.server import ThreadedMotoServer
except ModuleNotFoundError:
    ThreadedMotoServer = None


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a running S3 server, with credentials that it takes."""
    if ThreadedMotoServer is None:
        skip("object-store")
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("AWS_") or n.lower().endswith("_proxy")]:
            patch.delenv(name)
        running.start()
        host, port = running.get_host_and_port()
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        boto3.client("s3").create_bucket(Bucket="census")
        yield f"http://{host}:{port}"
        running.stop()


@pytest.fixture
def out(server: str) -> str:
    return f"s3://census/sweeps/{uuid.uuid4().hex}"
