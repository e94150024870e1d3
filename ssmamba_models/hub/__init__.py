"""The Hugging Face Hub: model cards, and trained weights published with them.

Loading needs nothing from here: `create_model("hf-hub:ORG/NAME", pretrained=True)`, of timm or of this package.
"""

from ssmamba_models.hub.card_page import CardInfo
from ssmamba_models.hub.publish import Published, publish

__all__ = ["CardInfo", "Published", "publish"]
