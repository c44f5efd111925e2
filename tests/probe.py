"""Do samples show their classes, and are they copies? Judged in features of a network trained elsewhere.

    python tests/probe.py samples --data cifar10/train --test cifar10/test \\
        --features-weights efficientnet_lite0.safetensors

A linear probe learns the classes of the photographs in --data. Printed is the part of the samples in which it
names the class they were made for, beside that of the photographs in --test; and the distance in features to
the nearest photograph in --data or its mirror image: the mean, and the distance below which one in a hundred
lies. Beside SAMPLES goes SAMPLES-nearest.png: the samples that are closest to a photograph, over it.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))
import fid  # noqa: E402
import rae_encoder  # noqa: E402


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("samples", help="a folder that sample.py wrote")
    parser.add_argument("--data", required=True, help="photographs to learn from, as class folders")
    parser.add_argument("--test", required=True, help="other photographs of the same classes")
    parser.add_argument("--features", default="tf_efficientnet_lite0", help="a timm model")
    parser.add_argument("--features-weights", help="default: the hub's")
    return parser.parse_args(argv)


def read(data):
    """All pixels, uint8 (N,3,S,S), and class numbers (N,) of an ImageData."""
    pixels, labels = zip(*(data[0, i] for i in range(len(data))), strict=True)
    return torch.stack(pixels), torch.tensor(labels)


@torch.no_grad()
def features_of(pixels, network, name):
    """Features (N,D) of images."""
    return torch.cat([network(batch) for batch in tqdm(pixels.split(50), name)])


def nearest_of(views, photographs):
    """Distances to, and numbers of, the photographs nearest to images seen in two views, (N,D) each."""
    distances = torch.stack([torch.cdist(features, photographs) for features in views])  # (2,N,M)
    return distances.amin(0).min(1)


def linear_probe(features, labels, decay=0.01):
    """Fit logistic regression on features of mean 0 and variance 1; returns a function to class numbers."""
    mean = features.mean(0)
    std = features.std(0) + 1e-3
    weight = torch.zeros(features.shape[1], int(labels.max()) + 1, requires_grad=True)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = (features - mean) / std @ weight + bias
        loss = F.cross_entropy(logits, labels) + decay / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda features: ((features - mean) / std @ weight + bias).argmax(1)


def main(argv=None):
    args = parse_args(argv)
    network, _ = fid.load_network(args.features, "adm", args.features_weights)
    settings = json.loads(Path(args.samples, "settings.json").read_text())
    folders = (args.data, args.test, args.samples)
    train, test, samples = (rae_encoder.ImageData(folder, settings["crop"]) for folder in folders)
    if train.classes != test.classes:
        raise SystemExit(f"{args.data} and {args.test} have different classes; the probe needs the same")
    photographs, train_labels = read(train)
    test_pixels, test_labels = read(test)
    pixels, _ = read(samples)
    train_features = features_of(photographs, network, args.data)
    # A training sees mirror images too. Mirroring the few images instead of all photographs is cheaper.
    test_views = [features_of(views, network, args.test) for views in (test_pixels, test_pixels.flip(-1))]
    views = [features_of(views, network, args.samples) for views in (pixels, pixels.flip(-1))]
    # Image i of sample.py is of the class i, counted round.
    classes = settings["classes"]
    numbers = [int(Path(samples.path(i)).stem) for i in range(len(samples))]
    sample_labels = torch.tensor([classes[number % len(classes)] for number in numbers])

    name = linear_probe(train_features, train_labels)
    nearest = nearest_of(views, train_features)
    nearest_of_test = nearest_of(test_views, train_features)
    result = {
        "named": (name(views[0]) == sample_labels).float().mean().item(),
        "named_of_test": (name(test_views[0]) == test_labels).float().mean().item(),
        "nearest": nearest.values.mean().item(),
        "nearest_of_test": nearest_of_test.values.mean().item(),
        "nearest_percent": nearest.values.quantile(0.01).item(),
        "nearest_percent_of_test": nearest_of_test.values.quantile(0.01).item(),
    }
    print(json.dumps({key: round(value, 3) for key, value in result.items()}))

    # Rows of ten: the closest samples, over the photographs beside which they look copied
    columns = min(10, len(pixels))
    count = min(40, len(pixels) // columns * columns)
    closest = nearest.values.argsort()[:count]
    pairs = torch.stack([pixels[closest], photographs[nearest.indices[closest]]], 1)  # (40,2,3,S,S)
    rows = [row.movedim(1, 0).flatten(0, 1) for row in pairs.split(columns)]  # (20,3,S,S) each
    sheet = make_grid(torch.cat(rows), nrow=columns)
    Image.fromarray(sheet.movedim(0, 2).numpy()).save(f"{args.samples.rstrip('/')}-nearest.png")


if __name__ == "__main__":
    rae_encoder.run(main)
