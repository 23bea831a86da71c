"""Write ``fashion_mnist_10k.npz``: the first 10,000 training images and all test images, as plain arrays.

``python examples/data/make.py FULL_SET`` where ``FULL_SET`` is what the examples take as ``--data``.
The members are compressed by LZMA, which ``np.load`` reads like any other ``.npz``.
"""

import io
import sys
import zipfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from fashion_mnist import EMBEDDED, load

arrays = {name: array[:10_000] for name, array in load(Path(sys.argv[1])).items()}
with zipfile.ZipFile(EMBEDDED, "w", zipfile.ZIP_LZMA) as archive:
    for name, array in arrays.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        archive.writestr(zipfile.ZipInfo(f"{name}.npy"), buffer.getvalue(), zipfile.ZIP_LZMA)
print(f"{EMBEDDED}: {EMBEDDED.stat().st_size / 1e6:.2f} MB")
