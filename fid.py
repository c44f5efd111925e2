"""Evaluation: FID, Inception Score, precision and recall of a set of images (paper, section 5).

    python fid.py samples                                         # built-in demo: CPU, a minute, no download
    python fid.py samples --ref VIRTUAL_imagenet256_labeled.npz   # gFID by the ADM protocol, as in the paper
    python fid.py reconstructions --ref imagenet/val --crop 256   # rFID
    python fid.py imagenet/train --crop 256 --save-stats ref.npz  # a reference, computed once
    torchrun --nproc-per-node 8 fid.py samples --ref ref.npz      # ranks share the images

A set is a folder (recursive, sorted), an uncompressed .tar, an .npz of images (arr_0, NHWC uint8) or one of
statistics (mu, sigma). A protocol leads from image to network input: adm (OpenAI's TensorFlow evaluator, the
paper's), pytorch-fid or clean (clean-fid). Numbers of other protocols, networks or counts do not compare.
"""

import argparse
import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

COMMON = dict(protocol="adm", features_weights="hub", batch_size=32, workers=min(8, os.cpu_count() or 1))
PRESETS = {  # reference, Inception's weights, how many samples and reference images
    "demo": dict(COMMON, ref="data/demo", inception_weights="random", num=400, ref_num=400),
    "paper": dict(COMMON, ref=None, inception_weights="hub", num=None, ref_num=None),
}
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HUB_URL = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"


def moments(features):
    """features (N,D) -> mean (D,), unbiased covariance (D,D), float64. Two passes: nothing cancels."""
    mu = features.mean(0, dtype=torch.float64)
    centred = (rows - mu for rows in features.split(1024))  # blocks bound the memory
    return mu, sum(rows.T @ rows for rows in centred) / (len(features) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """|mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017); mu (D,), sigma (D,D), float64.

    With S1 = R R^T the symmetric R^T S2 R has S1 S2's eigenvalues: real, and right for singular ones too.
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mu1, sigma1, mu2, sigma2))
    eigenvalues, vectors = torch.linalg.eigh(sigma1)
    root = vectors * eigenvalues.clamp(min=0).sqrt()
    trace_root = torch.linalg.eigvalsh(root.T @ sigma2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace_root
    return max(0.0, distance.item())


def inception_score(features, class_weight, split_size=5000):
    """exp(E KL(p(y|x) || p(y))), averaged over splits in order, the last as it comes (Salimans et al. 2016);
    features (N,2048), class_weight (1008,2048), and no bias, as in the TensorFlow evaluators.
    """
    scores = []
    for rows in features.split(split_size):
        log_p = (rows.double() @ class_weight.double().T).log_softmax(1)  # (n,1008)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(0).log())).sum(1).mean().exp().item())
    return sum(scores) / len(scores)


def precision_recall(samples, reference, neighbours=3, block=256):
    """Share of samples in the reference's manifold, and the reverse (Kynkaanniemi et al. 2019, eq. 1).

    samples (N,D), reference (M,D), over `neighbours` of each. A manifold: balls around points, each to its
    point's 3rd neighbour, itself not counted. Blocks of rows bound the memory.
    """

    def share_inside(points, centres):
        radii = []
        for start in range(0, len(centres), block):
            distance = torch.cdist(centres[start : start + block], centres)  # (block,M)
            distance.diagonal(start).fill_(torch.inf)
            radii.append(distance.topk(neighbours, largest=False).values[:, -1])
        radii = torch.cat(radii)
        inside = [(torch.cdist(rows, centres) <= radii).any(1) for rows in points.split(block)]
        return torch.cat(inside).double().mean().item()

    return share_inside(samples, reference), share_inside(reference, samples)


def inception_input(images, protocol):
    """uint8 (B,3,H,W) -> (B,3,299,299) in [-1,1] as the evaluator that `protocol` names does it."""
    x = images.float()
    if protocol == "pytorch-fid":
        return 2 * F.interpolate(x / 255, (299, 299), mode="bilinear", align_corners=False) - 1
    if protocol == "clean":  # Pillow's bicubic of float images: it computes in float64
        x = F.interpolate(x.double(), (299, 299), mode="bicubic", align_corners=False, antialias=True)
        x = x.clamp(0, 255).float()
    else:  # adm, TensorFlow 1's bilinear: source = index * in/out, without half-pixel centres
        for axis in (3, 2):
            source = torch.arange(299.0, device=x.device) * (x.shape[axis] / 299)
            low = source.long()
            left, right = (x.index_select(axis, i.clamp(max=x.shape[axis] - 1)) for i in (low, low + 1))
            x = left + (right - left) * (source - low).view(-1, *[1] * (3 - axis))
    return (x - 128) / 128


# Inception's blocks, "branch: convolution, convolution" as "channels kernel"; those in a | b share an input.
A = "1x1: 64 1x1; 5x5: 48 1x1, 64 5x5; 3x3dbl: 64 1x1, 96 3x3, 96 3x3"
C = "1x1: 192 1x1; 7x7: {n} 1x1, {n} 1x7, 192 7x1; 7x7dbl: {n} 1x1, {n} 7x1, {n} 1x7, {n} 7x1, 192 1x7"
E = "1x1: 320 1x1; 3x3: 384 1x1, 384 1x3 | 384 3x1; 3x3dbl: 448 1x1, 384 3x3, 384 1x3 | 384 3x1"
AVERAGE = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
MAX, HALVE = nn.MaxPool2d(3, stride=1, padding=1), nn.MaxPool2d(3, stride=2)
BLOCKS = {  # channels in, branches, pooling, channels of the convolution after the pooling
    "Mixed_5b": (192, A, AVERAGE, 32),  # 35 x 35 pixels
    "Mixed_5c": (256, A, AVERAGE, 64),
    "Mixed_5d": (288, A, AVERAGE, 64),
    "Mixed_6a": (288, "3x3: 384 3x3; 3x3dbl: 64 1x1, 96 3x3, 96 3x3", HALVE, 0),  # to 17 x 17 pixels
    "Mixed_6b": (768, C.format(n=128), AVERAGE, 192),
    "Mixed_6c": (768, C.format(n=160), AVERAGE, 192),
    "Mixed_6d": (768, C.format(n=160), AVERAGE, 192),
    "Mixed_6e": (768, C.format(n=192), AVERAGE, 192),
    "Mixed_7a": (768, "3x3: 192 1x1, 320 3x3; 7x7x3: 192 1x1, 192 1x7, 192 7x1, 192 3x3", HALVE, 0),
    "Mixed_7b": (1280, E, AVERAGE, 192),  # 8 x 8 pixels
    "Mixed_7c": (2048, E, MAX, 192),  # a maximum in the released graph, here alone
}


class ConvBN(nn.Sequential):
    def __init__(self, width, channels, kernel, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(width, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.relu = nn.ReLU(inplace=True)


class Mixed(nn.Module):
    """A block: (B,width,h,w) -> the outputs of its branches and of its pooling, concatenated."""

    def __init__(self, width, table, pool, pool_channels):
        super().__init__()
        self.pool, self.chains = pool, []
        for branch, chain in (row.split(": ") for row in table.split("; ")):
            channels, steps = width, chain.split(", ")
            self.chains.append([])
            for number, step in enumerate(steps, 1):
                names, channels_in = [], channels
                halve = pool is HALVE and number == len(steps)  # the branches halve the image at their end
                for letter, conv in zip("ab", step.split(" | "), strict=False):
                    channels, *sides = map(int, re.findall(r"\d+", conv))
                    stride, padding = (2, 0) if halve else (1, [side // 2 for side in sides])
                    names.append(f"branch{branch}" + f"_{number}" * (len(steps) > 1) + letter * ("|" in step))
                    self.add_module(names[-1], ConvBN(channels_in, channels, sides, stride, padding))
                self.chains[-1].append(names)
        self.branch_pool = ConvBN(width, pool_channels, 1) if pool_channels else nn.Identity()

    def forward(self, x):
        outputs = []
        for *steps, ends in self.chains:
            h = x
            for (name,) in steps:
                h = getattr(self, name)(h)
            outputs += [getattr(self, name)(h) for name in ends]
        return torch.cat(outputs + [self.branch_pool(self.pool(x))], 1)


class Inception(nn.Module):
    """The FID network: images uint8 (B,3,H,W) -> features (B,2048); class scores are features @ fc.weight.T.
    The state dict is named as pytorch-fid's released file. A new network is untrained, the same every time.
    """

    def __init__(self, protocol="adm"):
        super().__init__()
        self.protocol, self.width = protocol, 2048
        self.Conv2d_1a_3x3 = ConvBN(3, 32, 3, stride=2)  # 299 x 299 pixels -> 149 x 149
        self.Conv2d_2a_3x3 = ConvBN(32, 32, 3)
        self.Conv2d_2b_3x3 = ConvBN(32, 64, 3, padding=1)
        self.pool_2b = nn.MaxPool2d(3, stride=2)  # 73 x 73
        self.Conv2d_3b_1x1 = ConvBN(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvBN(80, 192, 3)
        self.pool_4a = nn.MaxPool2d(3, stride=2)  # 35 x 35
        for name, block in BLOCKS.items():
            self.add_module(name, Mixed(*block))
        self.fc = nn.Linear(2048, 1008)
        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            if weight.ndim > 1:  # He et al. 2015: the features keep their scale through 94 convolutions
                nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        self.eval().requires_grad_(False)

    def fold(self):
        """Merge batch norms into convolutions, go channels-last: 1.7 times faster. Renames the state dict."""
        for module in self.modules():
            if isinstance(module, ConvBN):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = inception_input(images, self.protocol).contiguous(memory_format=torch.channels_last)
        for layer in list(self.children())[:-1]:  # all but the classifier
            x = layer(x)
        return x.mean((2, 3))  # (B,2048,8,8) -> (B,2048)


class TimmFeatures(nn.Module):
    """A timm model's features of uint8 (B,3,H,W) at 224 px. FD-DINOv2 (Stein et al. 2023): no registers."""

    def __init__(self, name, weights):
        super().__init__()
        name = re.sub(r"^dinov2-(\w+)$", r"vit_\1_patch14_dinov2.lvd142m", name)
        overlay = None if weights == "hub" else dict(file=weights)
        self.model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=0)
        native = getattr(self.model, "pos_embed", None)
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(224)
        if "patch14_dinov2" in name:  # resized as by its authors; timm's way moves the features by 5 %
            grid = native[:, 1:].unflatten(1, (37, 37)).movedim(3, 1)  # (1,C,37,37)
            grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic", align_corners=False)
            self.model.pos_embed.data = torch.cat([native[:, :1], grid.flatten(2).mT], 1)
        self.width = self.eval().model.num_features

    def forward(self, images):
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", align_corners=False, antialias=True)
        mean, std = (x.new_tensor(self.model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return self.model((x.clamp(0, 255).round() / 255 - mean) / std)  # rounded, as Pillow's images are


def load_network(args, device):
    """-> network, and what it is: protocol, name, first digits of the weight file's SHA-256."""
    kind = "features" if args.features else "inception"
    weights = getattr(args, f"{kind}_weights")
    known = {"random": "random", "hub": "hub" if args.features else HUB_URL[-12:-4]}
    try:
        digest = known.get(weights) or hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:8]
        if args.features:
            return TimmFeatures(args.features, weights).to(device), f"224px {args.features} {digest}"
        network = Inception(args.protocol)
        if weights == "hub":
            state = torch.hub.load_state_dict_from_url(HUB_URL, None, "cpu", True, True, weights_only=True)
        elif weights != "random":
            state = torch.load(weights, "cpu", weights_only=True)
        if weights != "random":
            network.load_state_dict(dict(state))  # a plain dict may lack num_batches_tracked
    except Exception as error:  # files and hubs fail in types of all kinds
        reason = f"{' '.join(str(error).split())[:160]}; FILE is a copy of {args.features or HUB_URL}"
        raise SystemExit(f"--{kind}-weights {weights}: {reason}") from None
    return network.fold().to(device), f"{args.protocol} inception {digest}"


def to_rgb(image, crop=None):
    """Any Pillow image -> RGB, 8 bit: upright, 16 bits scaled, transparency on white; ADM's centre crop."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if not crop:
        return image
    while min(image.size) >= 2 * crop:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = crop / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    return image.crop((left, top, left + crop, top + crop))


class ImageSet(Dataset):
    """Images of a folder, .tar or .npz in fixed order, as uint8 (3,H,W), and the statistics in an .npz."""

    def __init__(self, path, flag, crop=None, num=None, spread=False):
        self.name, self.crop, self.shape, self.frame = f"{flag} {path}", crop, None, None
        self.mu = self.sigma = self.features = self.made_by = None
        try:
            self.items = self.open(path)  # (name, file, offset, size)
            if num:
                step = max(1, len(self.items) / num) if spread else 1
                self.items = [self.items[int(i * step)] for i in range(min(num, len(self.items)))]
                self.mu = self.features = None
            if self.mu is None and len(self) < 2:
                raise ValueError(f"{len(self)} images, at least 2 are needed")
            self.shape = self[0].shape if self.items else None
        except Exception as error:  # files, zip, tar, npy and Pillow raise what they like
            wanted = "images in a folder, .tar or .npz (arr_0), or mu and sigma in an .npz"
            raise SystemExit(f"{self.name}: {error}; expected {wanted}") from None

    def open(self, path):
        if path.endswith(".npz"):
            return self.open_npz(path)
        if path.endswith(".tar"):
            with tarfile.open(path, "r:") as tar:
                items = [(m.name, path, m.offset_data, m.size) for m in tar if m.isfile()]
        else:
            os.listdir(path)  # raises where glob finds nothing in silence
            names = glob.glob("**", root_dir=path, recursive=True)
            items = [(name, os.path.join(path, name), 0, -1) for name in names]
        return sorted(item for item in items if item[0].lower().endswith(EXTENSIONS))

    def open_npz(self, path):
        with np.load(path) as file:
            for key in {"mu", "sigma", "features", "made_by"} & set(file.files):
                setattr(self, key, file[key])
        mu, sigma = self.mu, self.sigma
        if mu is not None and (np.shape(sigma) != mu.shape * 2 or not np.isfinite(mu.sum() + sigma.sum())):
            raise ValueError("mu and sigma are not finite, of shapes (D,) and (D,D)")
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            if "arr_0.npy" not in archive.namelist():
                return []
            # Images are read one by one where they lie in the file: 50,000 would fill 10 GB of memory.
            entry = archive.getinfo("arr_0.npy")
            if entry.compress_type:
                raise ValueError("arr_0 is compressed, write it with np.savez")
            file.seek(entry.header_offset)
            file.seek(entry.header_offset + file.read(512).find(b"\x93NUMPY") + 8)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype != np.uint8 or shape[3:] != (3,):
                raise ValueError(f"arr_0 is {dtype} {shape}")
            self.frame, size = (shape[2], shape[1]), 3 * shape[1] * shape[2]
            return [(f"image {i}", path, file.tell() + i * size, size) for i in range(shape[0])]

    def __len__(self):
        return len(self.items) if self.features is None else len(self.features)

    def __getitem__(self, index):
        name, path, offset, size = self.items[index]
        try:
            data = np.fromfile(path, np.uint8, size, offset=offset).tobytes()
            image = Image.frombytes("RGB", self.frame, data) if self.frame else Image.open(io.BytesIO(data))
            pixels = torch.from_numpy(np.array(to_rgb(image, self.crop))).permute(2, 0, 1)
            if self.shape not in (None, pixels.shape):
                raise ValueError(f"{[*pixels.shape]}, unlike {self.items[0][0]} {[*self.shape]}; see --crop")
        except Exception as error:
            raise ValueError(f"{name}: {error}") from None
        return pixels


@torch.inference_mode()
def extract(images, network, args, device, rank, world):
    """Features (N,D), fp32, of all N images, on every rank; rank r computes images r, r + world, ..."""
    features, size = torch.zeros(len(images), network.width), max(1, args.batch_size // world)
    loader = DataLoader(Subset(images, range(rank, len(images), world)), size, num_workers=args.workers)
    try:
        for i, batch in enumerate(tqdm(loader, images.name, unit="batch", disable=rank > 0)):
            features[rank::world][i * size : (i + 1) * size] = network(batch.to(device)).float().cpu()
    except ValueError as error:  # a worker's comes with its traceback, the message last
        raise SystemExit(f"{images.name}: {str(error).split('ValueError: ')[-1].strip()}") from None
    if world > 1:  # a row is zero on all ranks but one, so the sum is exact
        features = features.to(device)
        dist.all_reduce(features)
    return features.cpu().numpy()


def parse_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("samples", nargs="?", default="samples", help="the set to judge (default: samples)")
    add("--preset", choices=PRESETS, help="default: paper where --ref or --save-stats is given, else demo")
    add("--ref", help="the reference set of FID, precision and recall")
    add("--protocol", choices=["adm", "pytorch-fid", "clean"], help="the way from image to Inception's input")
    add("--metrics", help="some of fid,is,prec,rec (default: all that the sets allow)")
    add("--crop", type=int, help="centre-crop the reference to this size; without --ref, the samples")
    add("--num", type=int, help="take the first so many samples")
    add("--ref-num", type=int, help="take so many reference images, spread evenly over their order")
    add("--save-stats", metavar="NPZ", help="write the samples' mu, sigma and features, for a later --ref")
    add("--inception-weights", metavar="FILE", help="or hub (fetched once), or random (means nothing)")
    add("--features", metavar="NAME", help="a timm model instead of Inception; dinov2-large gives FD-DINOv2")
    add("--features-weights", metavar="FILE", help="or hub")
    add("--batch-size", type=int, help="images a step, over all ranks; does not change results")
    add("--workers", type=int, help="processes that decode images")
    add("--json", action="store_true", help="print one JSON line on stdout")
    known = parser.parse_known_args(argv)[0]
    preset = known.preset or ("paper" if known.ref or known.save_stats else "demo")
    parser.set_defaults(**PRESETS[preset])
    return parser.parse_args(argv)


def choose_metrics(args, samples, reference=()):
    """-> the metrics that are asked for, or all that the sets allow."""
    possible = ["fid"] * bool(args.ref) + ["is"] * (len(samples) > 0 and not args.features)
    possible += ["prec", "rec"] * (min(len(samples), len(reference)) > 3)  # so that a third neighbour exists
    metrics = args.metrics.split(",") if args.metrics else possible
    if not set(metrics) <= set(possible) or not (metrics or args.save_stats):
        possible = f"{','.join(possible) or 'none'} (fid needs --ref, the others images)"
        raise SystemExit(f"--metrics {args.metrics}: these sets allow {possible}")
    return metrics


def main(argv=None):
    args = parse_args(argv)
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.backends.cudnn.allow_tf32 = False  # TF32 moves features by 1e-3

    sets = [ImageSet(args.samples, "samples", None if args.ref else args.crop, args.num)]
    sets += [ImageSet(args.ref, "--ref", args.crop, args.ref_num, spread=True)] if args.ref else []
    metrics = choose_metrics(args, *sets)
    made_by, network = {s.name: str(s.made_by) for s in sets if s.made_by}, None
    if metrics != ["fid"] or any(s.mu is None for s in sets):
        network, made_by["this run"] = load_network(args, device)
    if len(set(made_by.values())) > 1:
        raise SystemExit("not comparable: " + ", ".join(f"{name} is by {by}" for name, by in made_by.items()))
    counts = [len(s) if s.mu is None or s.features is not None else None for s in sets] + [None]
    about = dict(samples=args.samples, num=counts[0], ref=args.ref, ref_num=counts[1])
    about["by"] = next(iter(made_by.values()), "unknown")
    if rank == 0:
        note = "the demo, whose numbers compare with nothing: " * about["by"].endswith("random")
        note += ", ".join(f"{key} {value}" for key, value in about.items())
        biased = "; FID of fewer than 2048 images is biased" * (min(n or 2048 for n in counts) < 2048)
        print(f"{note}, fp32 on {world} x {device.type}{biased}", file=sys.stderr)

    for s, by_image in zip(sets, ({"is", "prec", "rec"}, {"prec", "rec"}), strict=False):
        if s.features is None and (s.mu is None or by_image & set(metrics)):
            s.features = extract(s, network, args, device, rank, world)
        if s.mu is None and rank == 0:
            s.mu, s.sigma = moments(torch.from_numpy(s.features))
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
    samples, reference, results = sets[0], sets[-1], {}
    if samples.mu.shape != reference.mu.shape:
        raise SystemExit(f"{samples.name}, {reference.name}: statistics of different networks")
    if "fid" in metrics:
        results["fid"] = frechet_distance(samples.mu, samples.sigma, reference.mu, reference.sigma)
    if "is" in metrics:
        results["is"] = inception_score(torch.from_numpy(samples.features), network.fc.weight.cpu())
    if {"prec", "rec"} & set(metrics):
        results["prec"], results["rec"] = precision_recall(*[torch.from_numpy(s.features) for s in sets])
    if args.save_stats:
        arrays = {key: getattr(samples, key) for key in ("mu", "sigma", "features")}
        with open(args.save_stats + ".tmp", "wb") as file:
            np.savez(file, made_by=about["by"], **{key: a for key, a in arrays.items() if a is not None})
        os.replace(args.save_stats + ".tmp", args.save_stats)
    print(json.dumps(results | about) if args.json else "\n".join(f"{k} {v:.6g}" for k, v in results.items()))


if __name__ == "__main__":
    main()
