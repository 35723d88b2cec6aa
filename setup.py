"""The one thing that pyproject.toml cannot say yet: the extension module."""

from setuptools import Extension, setup

# The .pyx itself is the source, not a .c made from it: setuptools hands it to Cython when it builds, so the sdist
# lists what was written by hand and nothing generated.
setup(ext_modules=[Extension("triosspi._framing", ["src/_framing.pyx"])])
