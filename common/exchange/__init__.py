"""An encoder handed on to other libraries, and taken over from them."""

from common.exchange.own import load_backbone

__all__ = ["load_backbone"]
