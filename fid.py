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
import ctypes
import glob
import hashlib
import io
import json
import math
import os
import re
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models.inception import BasicConv2d, Inception3, InceptionE
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
    return max(distance.item(), 0.0)  # in this order NaN stays NaN


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
        distances = (torch.cdist(rows, centres) for rows in centres.split(block))  # each (block,M)
        # One further than the neighbour asked for: the nearest to a point is itself.
        radii = torch.cat([distance.kthvalue(neighbours + 1).values for distance in distances])
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


def padding_not_counted(_module, inputs):
    """torchvision's averages of 3 x 3 pixels count the zeros around the image, TensorFlow's do not."""
    return inputs[0].div_(F.avg_pool2d(torch.ones_like(inputs[0][:1, :1]), 3, stride=1, padding=1))


class LastBlock(InceptionE):
    def forward(self, x):
        """As the block before it, with a maximum where that has an average."""
        *branches, _ = self._forward(x)
        return torch.cat([*branches, self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1))], 1)


class Inception(Inception3):
    """The FID network: images uint8 (B,3,H,W) -> features (B,2048); class scores are features @ fc.weight.T.

    TensorFlow's graph of 2015 as pytorch-fid ported it: torchvision's, but for the pooling in its blocks and
    the number of classes. A new one is untrained, the same every time.
    """

    def __init__(self, protocol="adm"):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.protocol, self.width = protocol, 2048
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(padding_not_counted)
        self.Mixed_7c = LastBlock(2048)
        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            if weight.ndim > 1:  # He et al. 2015: the features keep their scale through 94 convolutions
                nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        self.eval().requires_grad_(False)

    def fold(self):
        """Merge batch norms into convolutions, go channels-last: 1.7 times faster. Renames the state dict."""
        for module in self.modules():
            if isinstance(module, BasicConv2d):
                module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        return self.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = inception_input(images, self.protocol).contiguous(memory_format=torch.channels_last)
        for layer in list(self.children())[:-3]:  # all but average, dropout and classifier
            x = layer(x)
        return x.mean((2, 3))  # (B,2048,8,8) -> (B,2048)


class TimmFeatures(nn.Module):
    """A timm model's features of uint8 (B,3,H,W) at 224 px. FD-DINOv2 (Stein et al. 2023): no registers."""

    def __init__(self, name, weights):
        super().__init__()
        import timm  # a second that Inception does not wait for

        name = re.sub(r"^dinov2-(\w+)$", r"vit_\1_patch14_dinov2.lvd142m", name)
        if not timm.is_model(name):
            raise SystemExit(f"--features {name}: no model that timm knows")
        overlay = None if weights == "hub" else dict(file=weights)
        self.model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
        self.model.reset_classifier(0)  # not earlier: without its classifier timm takes any file
        native = getattr(self.model, "pos_embed", None)
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(224)
        if "patch14_dinov2" in name:  # resized as by its authors; timm's way moves the features by 5 %
            grid = native[:, 1:].unflatten(1, (37, 37)).movedim(3, 1)  # (1,C,37,37)
            grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")  # to 16 x 16
            self.model.pos_embed.data = torch.cat([native[:, :1], grid.flatten(2).mT], 1)
        self.width = self.eval().model.head_hidden_size

    def forward(self, images):
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", align_corners=False, antialias=True)
        mean, std = (x.new_tensor(self.model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        return self.model((x.clamp(0, 255).round() / 255 - mean) / std)  # rounded, as Pillow's images are


def load_network(args):
    """-> network, and what it is: protocol, name, first digits of the weight file's SHA-256."""
    weights = args.features_weights if args.features else args.inception_weights
    try:
        digest = weights
        if weights not in ("hub", "random"):
            digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()[:8]
        if args.features:
            return TimmFeatures(args.features, weights), f"224px {args.features} {digest}"
        network = Inception(args.protocol)
        if weights == "hub":
            digest = HUB_URL[-12:-4]
            state = torch.hub.load_state_dict_from_url(HUB_URL, check_hash=True, weights_only=True)
        elif weights != "random":
            safe = weights.endswith(".safetensors")
            state = load_file(weights) if safe else torch.load(weights, "cpu", weights_only=True)
        if weights != "random":
            network.load_state_dict(dict(state))  # a plain dict may lack num_batches_tracked
    except Exception as error:  # files and hubs fail in types of all kinds
        flag = "--features-weights" if args.features else "--inception-weights"
        reason = f"{' '.join(str(error).split())[:160]}; FILE is a copy of {args.features or HUB_URL}"
        raise SystemExit(f"{flag} {weights}: {reason}") from None
    return network.fold(), f"{args.protocol} inception {digest}"


def natural_order(names):
    """Names sorted with numbers by value; ties, as of `1` and `01` or `a` and `A`, by the plain string."""
    split = re.compile("([0-9]+)").split

    def key(name):
        parts = split(name.lower())  # text and digits take turns
        parts[1::2] = map(int, parts[1::2])
        return parts

    return sorted(sorted(names), key=key)  # sorting leaves ties as they are


def list_images(root, flag):
    """The images below the folder `root`, which `flag` names -> classes, names, labels, left_out.

    classes: the folders with images, relative to root (root itself is ""), each level in natural order. names
    (N,), bytes: the file names, class by class, each in natural order. labels (N,), int32: the class of each.
    left_out: what was not taken, in words, or "". Links are followed, each real folder is listed once, and
    names that begin with a dot are skipped. Raises SystemExit where a folder can't be read, where images lie
    beside class folders, and where there is no image.
    """

    def refuse(error):
        raise SystemExit(f"{flag} {error.filename}: {error.strerror}; expected a folder of images")

    classes = []
    names = []  # an array a class: a million strings would take 100 MB
    left_out = {"files of other kinds": 0, "folders without images": 0, "folders listed before": 0}
    listed = set()
    for folder, subfolders, files in os.walk(root, onerror=refuse, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in listed:
            left_out["folders listed before"] += 1
            subfolders.clear()  # a link to itself or a parent ends here
            continue
        listed.add((status.st_dev, status.st_ino))

        # os.walk goes on with what is left in this list, in its order.
        subfolders[:] = natural_order(name for name in subfolders if name[0] != ".")
        files = [name for name in files if name[0] != "."]
        images = [name for name in files if name.lower().endswith(EXTENSIONS)]
        left_out["files of other kinds"] += len(files) - len(images)
        if not images:
            left_out["folders without images"] += not subfolders
            continue

        # A folder is followed by what is below it: comparing with the class before finds all mixtures.
        relative = folder[len(os.path.join(root, "")) :]
        if classes and relative.startswith(os.path.join(classes[-1], "")):
            beside = os.path.join(root, classes[-1], os.fsdecode(names[-1][0]))
            mixture = f"{beside} lies beside the class folder {folder}"
            raise SystemExit(f"{flag} {root}: {mixture}; move it into a folder of its own, or away")
        classes.append(relative)
        names.append(np.array([os.fsencode(name) for name in natural_order(images)]))

    counts = ", ".join(f"{kind} ({count})" for kind, count in left_out.items() if count)
    if not classes:
        raise SystemExit(f"{flag} {root}: no {' '.join(EXTENSIONS)} in it; left out: {counts}")
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), [len(array) for array in names])
    return classes, np.concatenate(names), labels, f"left out: {counts}" if counts else ""


def to_rgb(image, crop=None):
    """Any Pillow image -> RGB, 8 bit: upright, 16 bits scaled, transparency on white; ADM's centre crop."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    if crop is None:
        return image
    while min(image.size) >= 2 * crop:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = crop / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    return image.crop((left, top, left + crop, top + crop))


class ImageSet(Dataset):
    """Images of a folder, .tar or .npz in fixed order, as uint8 (3,H,W), and the statistics in an .npz.

    Raises SystemExit where it has neither, and ValueError at an image that can't be used.
    """

    def __init__(self, path, flag, crop=None, num=None, spread=False):
        self.name, self.crop, self.shape, self.frame = f"{flag} {path}", crop, None, None
        self.mu = self.sigma = self.features = self.made_by = None
        try:
            self.items = self.open_npz(path) if path.endswith(".npz") else self.list_files(path)
            if num:
                step = max(1, len(self.items) / num) if spread else 1
                self.items = [self.items[int(i * step)] for i in range(min(num, len(self.items)))]
                self.mu = self.features = None
            if self.mu is None and len(self) < 2:
                raise ValueError(f"{len(self)} images, at least 2 are needed")
            self.shape = self[0].shape if self.items else None
        except Exception as error:  # files, zip, tar, npy and Pillow raise what they like
            wanted = "images in a folder, .tar or .npz (arr_0), or mu and sigma in an .npz"
            raise SystemExit(f"{self.name}: {' '.join(str(error).split())}; expected {wanted}") from None

    def list_files(self, path):
        """-> (name, file, offset, bytes) of each image, sorted."""
        if path.endswith(".tar"):
            with tarfile.open(path, "r:") as tar:
                items = [(file.name, path, file.offset_data, file.size) for file in tar if file.isfile()]
        else:
            os.listdir(path)  # raises where glob finds nothing in silence
            names = glob.glob("**", root_dir=path, recursive=True)
            items = [(name, os.path.join(path, name), 0, -1) for name in names]
        return sorted(item for item in items if item[0].lower().endswith(EXTENSIONS))

    def open_npz(self, path):
        """Keeps the statistics; the images, 10 GB perhaps, are listed where they lie in the file."""
        dtypes = dict(mu=np.float64, sigma=np.float64, features=np.float32, made_by=str)
        size = os.path.getsize(path)
        with zipfile.ZipFile(path) as archive, np.load(path) as arrays:
            if sum(entry.file_size for entry in archive.infolist()) > 100 * size:
                raise ValueError("it is a zip bomb")
            for key in dtypes.keys() & set(arrays.files if "mu" in arrays else ()):
                setattr(self, key, np.asarray(arrays[key], dtypes[key]))
            entry = archive.NameToInfo.get("arr_0.npy")
        if self.mu is not None:
            rows = self.mu[None] if self.features is None else self.features
            fits = self.mu.ndim == 1 and np.shape(self.sigma) == 2 * self.mu.shape == 2 * rows.shape[1:]
            if not fits or not np.isfinite(self.mu.sum() + self.sigma.sum() + rows.sum()):
                raise ValueError("mu, sigma, features are not finite, of shapes (D,), (D,D), (N,D)")
        if entry is None:
            return []
        if entry.compress_type:
            raise ValueError("arr_0 is compressed, write it with np.savez")
        with open(path, "rb") as file:
            file.seek(entry.header_offset)
            file.seek(entry.header_offset + file.read(512).find(b"\x93NUMPY") + 8)
            shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        fits = dtype == np.uint8 and not transposed and shape[3:] == (3,) and min(shape) > 0
        if not fits or start + math.prod(shape) > size:
            raise ValueError(f"arr_0 is {dtype} {shape}, not whole uint8 images (N,H,W,3)")
        self.frame, size = (shape[2], shape[1]), math.prod(shape[1:])
        return [(f"image {i}", path, start + i * size, size) for i in range(shape[0])]

    def __len__(self):
        return len(self.items if self.features is None else self.features)

    def __getitem__(self, index):
        name, path, offset, size = self.items[index]
        try:
            data = np.fromfile(path, np.uint8, size, offset=offset).tobytes()
            image = Image.frombytes("RGB", self.frame, data) if self.frame else Image.open(io.BytesIO(data))
            pixels = torch.from_numpy(np.array(to_rgb(image, self.crop))).permute(2, 0, 1)
            if self.shape not in (None, pixels.shape):
                raise ValueError(f"{[*pixels.shape]}, unlike {self.items[0][0]} {[*self.shape]}; see --crop")
        except Exception as error:
            reason = str(error).split(" <_io")[0]  # Pillow's name for bytes in memory
            raise ValueError(" ".join(f"{name}: {reason}".split())) from None
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
    args = parser.parse_args(argv)
    for flag, least in dict(num=1, ref_num=1, crop=1, batch_size=1, workers=0).items():
        if getattr(args, flag) is not None and getattr(args, flag) < least:
            raise SystemExit(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected {least} or more")
    folder, name = os.path.split(args.save_stats or "x.npz")
    if not os.path.isdir(folder or ".") or not name.endswith(".npz"):
        raise SystemExit(f"--save-stats {args.save_stats}: expected an .npz in a folder that is there")
    return args


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
    if sys.platform == "linux":  # glibc returns large blocks at every free; new pages cost 15 % of the time
        ctypes.CDLL(None).mallopt(-1, 2**29)  # M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(-3, 2**31 - 1)  # M_MMAP_THRESHOLD

    sets = [ImageSet(args.samples, "samples", None if args.ref else args.crop, args.num)]
    sets += [ImageSet(args.ref, "--ref", args.crop, args.ref_num, spread=True)] if args.ref else []
    samples, reference, results = sets[0], sets[-1], {}
    metrics = choose_metrics(args, *sets)
    made_by, network = {s.name: str(s.made_by) for s in sets if s.made_by is not None}, None
    if metrics != ["fid"] or any(s.mu is None for s in sets):
        network, made_by["this run"] = load_network(args)
        network.to(device)
    if len(set(made_by.values())) > 1:
        raise SystemExit("not comparable: " + ", ".join(f"{name} is by {by}" for name, by in made_by.items()))
    widths = {len(s.mu) for s in sets if s.mu is not None} | ({network.width} if network else set())
    if len(widths) > 1:
        raise SystemExit(f"{', '.join(s.name for s in sets)}: not comparable, features of widths {widths}")
    counts = [len(s) if s.mu is None or s.features is not None else None for s in sets] + [None]
    about = dict(samples=args.samples, num=counts[0], ref=args.ref, ref_num=counts[1])
    about["by"] = next(iter(made_by.values()), "unknown")
    if rank == 0:
        note = "the demo, whose numbers compare with nothing: " * about["by"].endswith("random")
        note += ", ".join(f"{key} {value}" for key, value in about.items())
        biased = "; FID of fewer than 2048 images is biased" * (min(n or 2048 for n in counts) < 2048)
        print(f"{note}, fp32 on {world} x {device.type}{biased}", file=sys.stderr)

    for s in sets:
        by_image = {"prec", "rec"} | ({"is"} if s is samples else set())
        if s.features is None and (s.mu is None or by_image & set(metrics)):
            s.features = extract(s, network, args, device, rank, world)
        if s.mu is None and rank == 0:
            s.mu, s.sigma = moments(torch.from_numpy(s.features))
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return
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
    results = {key: results[key] for key in metrics}
    print(json.dumps(results | about) if args.json else "\n".join(f"{k} {v:.6g}" for k, v in results.items()))


if __name__ == "__main__":
    main()
