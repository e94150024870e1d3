"""An encoder in a plain PyTorch loop: timm's optimiser with layer decay, a cosine schedule, nothing hidden.

python examples/fine_tune_in_your_code.py [--folder tiles] [--model ssmamba_tiny] [--epochs 6]

Without --folder synthetic H&E tiles of three kinds are drawn; a folder of your own must hold one folder per class.
"""

import argparse
import tempfile

import timm
import torch
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from torch.utils.data import DataLoader, Subset

import ssmamba_models  # noqa: F401  (importing it registers the models with timm)
from ssmamba_models.data.synthetic import write_synthetic_tiles
from ssmamba_models.data.tiles import TileDataset, collate_tiles, find_tiles


def split(tiles, size, model):
    """Every fourth tile for validation. Real work splits by patient, so that no patient is on both sides."""
    config = resolve_model_data_config(model, {"img_size": size})
    train = TileDataset(
        tiles, create_transform(**config, is_training=True, scale=(0.6, 1.0), vflip=0.5, color_jitter=0.1)
    )
    val = TileDataset(tiles, create_transform(**config, is_training=False))
    held_out = set(range(0, len(tiles), 4))
    kept = [index for index in range(len(tiles)) if index not in held_out]
    return Subset(train, kept), Subset(val, sorted(held_out))


def run_epoch(model, loader, targets, optimizer=None, schedule=None):
    """One pass; trains where an optimizer is given. Returns mean loss and accuracy."""
    model.train(optimizer is not None)
    total_loss, hits, count = 0.0, 0, 0
    for batch in loader:
        if batch.images is None:  # no tile of this batch can be read
            continue
        target = targets[batch.indices]
        with torch.set_grad_enabled(optimizer is not None):
            logits = model(batch.images)
            loss = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
        if optimizer is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        total_loss += loss.item() * len(target)
        hits += (logits.argmax(dim=1) == target).sum().item()
        count += len(target)
    if count == 0:
        raise SystemExit("no tile can be read for " + ("training" if optimizer is not None else "validation"))
    return total_loss / count, hits / count


def fine_tune(folder, name, epochs, size, batch_size=16):
    """Train on three quarters of the tiles; prints loss and accuracy of each epoch."""
    tiles = find_tiles(folder)
    if tiles.labels is None:
        raise SystemExit(f"{folder} needs one folder per class, with every tile in one of them")
    if len(tiles) < 2:
        raise SystemExit(f"{folder} needs two tiles or more: one to train on, one to validate with")
    classes = sorted(set(tiles.labels))
    targets = torch.tensor([classes.index(label) for label in tiles.labels])
    model = timm.create_model(name, num_classes=len(classes), drop_path_rate=0.05)
    train, val = split(tiles, size, model)
    loader = DataLoader(train, batch_size, shuffle=True, collate_fn=collate_tiles)
    val_loader = DataLoader(val, batch_size, collate_fn=collate_tiles)
    # Early layers learn more slowly: 0.65 is the usual decay for a pretrained encoder.
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.65)
    rates = [group["lr"] * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=epochs * len(loader))
    for epoch in range(epochs):
        loss, accuracy = run_epoch(model, loader, targets, optimizer, schedule)
        _, val_accuracy = run_epoch(model, val_loader, targets)
        print(f"epoch {epoch + 1}: loss {loss:.3f}, accuracy {accuracy:.0%}, validation {val_accuracy:.0%}")
    return val_accuracy


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="tiles in one folder per class")
    parser.add_argument("--model", default="ssmamba_tiny", help="ours, or any timm name; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--size", type=int, default=96, help="side of the input in pixels; default: %(default)s")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or write_synthetic_tiles(scratch, tiles_per_kind=32)
        fine_tune(folder, arguments.model, arguments.epochs, arguments.size)


if __name__ == "__main__":
    main()
