"""The trained weights that ship with the package.

Of each there are `<model>.<tag>.safetensors` (bfloat16), its model card `<model>.<tag>.md`, and `<model>.<tag>.yaml`,
the configuration of the run that made it.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
ORGANIZATION = "ssmamba-models"  # on the Hugging Face Hub


def weight_source(name: str) -> dict[str, str]:
    """Where timm finds the weights of a name: in this folder, else on the Hub.

    Args:
        name: "<model>.<tag>".

    Returns:
        Entries of a timm pretrained configuration: `hf_hub_id`, and `file` where the file is here. timm takes the
        file first, and then needs no network.
    """
    source = {"hf_hub_id": f"{ORGANIZATION}/{name}"}
    path = FOLDER / f"{name}.safetensors"
    return {**source, "file": str(path)} if path.is_file() else source
