"""The version of this package, in a module that imports nothing.

Files and run folders record it. It knows nothing else; the number itself is kept here and read by the build from here.
Bump it together with the changelog.
"""

__version__ = "0.1.0"
