"""An S3 server for the tests of this folder, and a bucket for each of them."""

from tests.support_s3 import bucket, environment, proxy, server

__all__ = ["bucket", "environment", "proxy", "server"]
