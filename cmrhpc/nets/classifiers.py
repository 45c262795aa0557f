"""Classifiers: ResNet-50 (torchvision) and Xception (timm), 1 or 3 channels, any number of classes (METHODS M10)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from cmrhpc.errors import BadInput

FIRST_CONV, HEAD = "conv1.weight", "fc."  # of both networks


def build_classifier(network: str, channels: int, n_classes: int, seed: int, weights: str = "") -> nn.Module:
    """A classifier, images (N, channels, H, W) -> logits (N, n_classes), with seeded random weights.

    network: resnet50 or xception. weights: a local safetensors file with the names of torchvision's or timm's state
    dict; its head is left out when the classes differ, its first convolution is summed over colour for one
    channel. Raises BadInput when the file is unreadable or does not fit.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if network == "resnet50":
            from torchvision.models import resnet50

            model = resnet50(weights=None, num_classes=n_classes)
            if channels != 3:
                model.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
                nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        elif network == "xception":
            import timm

            model = timm.create_model("legacy_xception", pretrained=False, num_classes=n_classes, in_chans=channels)
        else:
            raise BadInput(f'unknown classifier network "{network}"', mend="known: resnet50, xception")
    if weights:
        _load_weights(model, network, channels, weights)
    return model


def _load_weights(model: nn.Module, network: str, channels: int, file: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        given = load_file(Path(file))
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot read the weights: {error}", file, "give a safetensors file") from None
    own = model.state_dict()
    if FIRST_CONV in given and given[FIRST_CONV].shape[1] == 3 and channels == 1:
        given[FIRST_CONV] = given[FIRST_CONV].sum(1, keepdim=True)  # grey in three channels gives the same response
    for name in [n for n in given if n.startswith(HEAD) and (n not in own or given[n].shape != own[n].shape)]:
        del given[name]
    wrong = [n for n, t in given.items() if n not in own or t.shape != own[n].shape]
    missing = [n for n in own if n not in given and not n.startswith(HEAD) and not n.endswith("num_batches_tracked")]
    if wrong or missing:
        names = ", ".join((wrong + missing)[:5])
        raise BadInput(f"the weights are not those of a {network}: {names}", file, "give the network's own state dict")
    model.load_state_dict(given, strict=False)
