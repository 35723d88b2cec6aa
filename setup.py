"""The one thing that pyproject.toml cannot say yet: the extension modules."""

from setuptools import Extension, setup

# The .pyx itself is the source, not a .c made from it: setuptools hands it to Cython when it builds, so the sdist
# lists what was written by hand and nothing generated.
setup(
    ext_modules=[
        Extension("triosspi._framing", ["src/_framing.pyx"]),
        # Needs OpenSSL 3 and its headers. Where they are not, it is left out, and pyspnego seals.
        Extension("triosspi._sealing", ["src/_sealing.pyx"], libraries=["crypto"], optional=True),
    ]
)
