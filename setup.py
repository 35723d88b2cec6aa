"""The one thing that pyproject.toml cannot say yet: the extension modules."""

import sys
from glob import glob

from setuptools import Extension, setup

# The .pyx itself is the source, not a .c made from it: setuptools hands it to Cython when it builds, so the sdist
# lists what was written by hand and nothing generated.
shared = sorted(glob("src/shared/*.pxi"))
extensions = [
    Extension("triosspi._framing", ["src/_framing.pyx"], depends=shared),
    # Needs OpenSSL 3 and its headers. Where they are not, it is left out, and pyspnego seals.
    Extension(
        "triosspi._sealing",
        ["src/_sealing.pyx"],
        depends=[*shared, *sorted(glob("src/sealing/*.pxi"))],
        libraries=["crypto"],
        optional=True,
    ),
]
if sys.platform == "linux":
    # System calls of Linux. Where the kernel's headers are not, it is left out, and nobody is impersonated.
    extensions.append(Extension("triosspi._thread_ids", ["src/_thread_ids.pyx"], optional=True))

setup(ext_modules=extensions)
