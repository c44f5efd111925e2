"""Evaluation: FID, Inception Score, precision and recall of a set of images (paper, section 5).

    python fid.py samples                                         # against what their flow was trained on
    python fid.py samples --ref imagenet256                       # gFID by the ADM protocol, as in the paper
    python fid.py reconstructions --ref imagenet/val --crop 256   # rFID
    python fid.py imagenet/train --crop 256 --save-stats ref.npz  # a reference, computed once

A set is a folder of images, an .npz of images (arr_0, uint8 (N,H,W,3)) or an .npz of statistics (mu, sigma).
--ref imagenet256 and imagenet512 mean ADM's reference batches, even where a file or folder is named so.
A protocol leads from image to network input: adm (OpenAI's TensorFlow evaluator, the paper's), pytorch-fid or
clean (clean-fid). Numbers of other protocols, networks or counts do not compare.

Letters in shapes: B batch, N and M images, D width of the features.
"""

import argparse
import contextlib
import hashlib
import json
import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image, ImageOps, PngImagePlugin
from safetensors.torch import load_file
from torch import nn
from torchvision.models.inception import Inception3
from torchvision.transforms.functional import crop, normalize, pil_to_tensor, resize
from tqdm import tqdm

# DEMO holds the defaults for the demo's samples.
DEMO = {"inception_weights": "random", "num": 200, "ref_num": 200}
# ADM's reference batches hold mu and sigma of ImageNet and 10,000 of its images (Dhariwal & Nichol 2021).
URLS = {
    "imagenet256": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz",
    "imagenet512": "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/512/VIRTUAL_imagenet512.npz",
    "hub": "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
}


def moments(features):
    """Compute mean (D,), covariance (D,D), float64, of features (N,D). Two passes: nothing cancels."""
    mu = features.mean(0, dtype=torch.float64)
    # Blocks of rows bound the memory.
    centred = (rows - mu for rows in features.split(1024))  # each (1024,D), float64
    sigma = sum(x.T @ x for x in centred)
    return mu, sigma / (len(features) - 1)


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017).

    mu (D,), sigma (D,D), computed in float64. With S1 = R R^T the symmetric R^T S2 R has the eigenvalues
    of S1 S2: real, and right for singular covariances too.
    """
    mu1, sigma1, mu2, sigma2 = (np.asarray(x, np.float64) for x in (mu1, sigma1, mu2, sigma2))
    eigenvalues, vectors = scipy.linalg.eigh(sigma1)
    # Rounding makes eigenvalues near 0 negative.
    root = vectors * np.sqrt(eigenvalues.clip(min=0))  # (D,D)
    eigenvalues = scipy.linalg.eigvalsh(root.T @ sigma2 @ root)
    trace_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    distance = np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_root
    # max() returns its first argument, NaN too, where no other is larger.
    return max(distance, 0.0)


def inception_score(features, class_weight, split_size=5000):
    """Return exp(E KL(p(y|x) || p(y))), the mean over splits in order (Salimans et al. 2016).

    features (N,2048), class_weight (1008,2048); no bias, as in the TensorFlow evaluators. The last split may
    be shorter.
    """
    scores = []
    for rows in features.split(split_size):
        log_p = (rows.double() @ class_weight.double().T).log_softmax(1)  # (n,1008)
        p = log_p.exp()  # p(y|x), whose mean over the rows is p(y)
        divergence = (p * (log_p - p.mean(0).log())).sum(1)  # (n,)
        scores.append(divergence.mean().exp().item())
    return sum(scores) / len(scores)


def precision_recall(samples, reference, neighbours=3, block=256):
    """Compute the share of samples in the reference's manifold, and the reverse (Kynkaanniemi et al. 2019).

    samples (N,D), reference (M,D), more than `neighbours` of each. A manifold (eq. 1) is a union of balls
    around all points, each out to a 3rd neighbour, itself not counted. Blocks of rows bound the memory.
    """

    def share_inside(points, centres):
        # +1: each point's nearest neighbour is itself.
        radii = [torch.cdist(rows, centres).kthvalue(neighbours + 1).values for rows in centres.split(block)]
        inside = [(torch.cdist(rows, centres) <= torch.cat(radii)).any(1) for rows in points.split(block)]
        return torch.cat(inside).double().mean().item()

    return share_inside(samples, reference), share_inside(reference, samples)


def inception_input(images, protocol):
    """Resize uint8 (B,3,H,W) to (B,3,299,299) in [-1,1] as the evaluator that `protocol` names does it."""
    x = images.float()
    # pytorch-fid resizes with half-pixel centres and without antialias.
    if protocol == "pytorch-fid":
        return 2 * F.interpolate(x / 255, (299, 299), mode="bilinear") - 1
    # clean-fid resizes float images by Pillow's bicubic, which computes in float64.
    if protocol == "clean":
        x = F.interpolate(x.double(), (299, 299), mode="bicubic", antialias=True)
        x = x.clamp(0, 255).float()
    # TensorFlow 1's bilinear (adm) has source = index * in/out, without half-pixel centres.
    else:
        weights = []
        for size in x.shape[2:]:
            source = torch.arange(299.0) * (size / 299)
            offset = source.clamp(max=size - 1).view(299, 1) - torch.arange(size)
            weights.append(F.relu(1 - offset.abs()).to(x.device))  # (299,H), then (299,W)
        x = weights[0] @ x @ weights[1].T  # (B,3,299,299)
    return (x - 128) / 128


def padding_not_counted(_module, inputs):
    """Divide the input of branch_pool, an avg_pool2d(x, 3, padding=1), by each window's share of real pixels.

    torchvision's averages count the zeros around the image, TensorFlow's do not.
    """
    x = inputs[0]
    share = F.avg_pool2d(torch.ones_like(x[:1, :1]), 3, stride=1, padding=1)  # (1,1,H,W), below 1 at edges
    # Nothing else reads x, so div_ saves a large copy.
    return x.div_(share)


class Inception(Inception3):
    """The FID network maps uint8 (B,3,H,W) to features (B,2048); class scores are features @ fc.weight.T.

    TensorFlow's graph of 2015, as pytorch-fid ported it, differs from torchvision's in the pooling of its
    blocks and the number of classes. A new one is untrained, the same every time.
    """

    def __init__(self, protocol="adm"):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)
        self.protocol = protocol
        for block in self.children():
            if hasattr(block, "branch_pool"):
                block.branch_pool.register_forward_pre_hook(padding_not_counted)

        generator = torch.Generator().manual_seed(0)
        for weight in self.parameters():
            # He et al. 2015: the features keep their scale through 94 convolutions.
            if weight.ndim > 1:
                nn.init.kaiming_normal_(weight, nonlinearity="relu", generator=generator)
        self.eval().requires_grad_(False)

    def fold(self):
        """Merge batch norms into convolutions, go channels-last: 1.7 times faster. Renames the state dict."""
        for module in self.modules():
            if hasattr(module, "bn"):
                module.conv = nn.utils.fuse_conv_bn_eval(module.conv, module.bn)
                module.bn = nn.Identity()
        return self.to(memory_format=torch.channels_last)

    def forward(self, images):
        x = inception_input(images, self.protocol)
        # The children are in the order of torchvision's forward; the last are Mixed_7c, average, dropout, fc.
        for layer in list(self.children())[:-4]:
            x = layer(x)  # at the end (B,2048,8,8)
        # Mixed_7c has a maximum where torchvision's private _forward takes an average, its last branch.
        *branches, _ = self.Mixed_7c._forward(x)
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        # Calling .forward leaves the hook out.
        x = torch.cat([*branches, self.Mixed_7c.branch_pool.forward(pooled)], 1)
        return x.mean((2, 3))


class TimmFeatures(nn.Module):
    """A timm model maps uint8 (B,3,H,W), resized to 224 px, to its features (B,D).

    FD-DINOv2 (Stein et al. 2023) has no registers. state: its weights, or None for timm's own from the hub.
    """

    def __init__(self, name, state):
        super().__init__()
        # The import takes a second that Inception does not wait for.
        import timm

        self.model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"state_dict": state})
        # timm compares the file with all keys, so its classifier goes afterwards.
        self.model.reset_classifier(0)

        native = getattr(self.model, "pos_embed", None)
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(224)
        # DINOv2's authors resize their positions so; timm's way moves the features by 5 %.
        if "patch14_dinov2" in name:
            grid = native[:, 1:].unflatten(1, (37, 37)).movedim(3, 1)  # (1,C,37,37)
            grid = F.interpolate(grid, scale_factor=16.1 / 37, mode="bicubic")  # to 16 x 16
            self.model.pos_embed.data = torch.cat([native[:, :1], grid.flatten(2).mT], 1)
        self.eval()

    def forward(self, images):
        # torchvision clips and rounds as Pillow does.
        x = resize(images, [224, 224], Image.Resampling.BICUBIC) / 255  # (B,3,224,224)
        config = self.model.pretrained_cfg
        return self.model(normalize(x, config["mean"], config["std"]))  # (B,D)


@torch.inference_mode()
@torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
def extract(source, network, batch_size, workers, device):
    """Compute the features (N,D), fp32, of the images of an ImageSet. TF32 would move them by 1e-3.

    Raises SystemExit at an image that can't be used, and for features that are not finite.
    """
    network.to(device)
    features = []
    starts = range(0, len(source.items), batch_size)
    # Pillow decodes without Python's lock, and a GPU computes while the next batch is decoded.
    with ThreadPoolExecutor(workers or 1) as threads:
        for i in tqdm(starts, source.path):
            images = threads.map(source.read, source.items[i : i + batch_size])
            batch = torch.stack(list(images)).to(device)  # uint8 (B,3,H,W)
            features += [network(batch)]  # (B,D)
    features = torch.cat(features).cpu()
    # Precision and recall of NaN would be 0, in silence.
    if not features.isfinite().all():
        raise SystemExit(f"{source.path}: its features are not finite; are the weights the network's?")
    return features


def evaluate(metrics, network, samples, reference=None):
    """Compute {metric: number} of one or two ImageSets; prec and rec come together."""
    results = {}
    if "fid" in metrics:
        results["fid"] = frechet_distance(*samples.moments, *reference.moments)
    if "is" in metrics:
        results["is"] = inception_score(samples.features, network.fc.weight.cpu())
    if "prec" in metrics or "rec" in metrics:
        results["prec"], results["rec"] = precision_recall(samples.features, reference.features)
    return results


def main(argv=None):
    args = parse_args(argv)

    # Sets are opened before any network is fetched or built. The Inception Score alone needs no reference.
    sets = [ImageSet(args.samples, None if args.ref else args.crop, args.num)]
    if args.ref and args.metrics != "is":
        sets += [ImageSet(local_file(args.ref), args.crop, args.ref_num, spread=True)]
    metrics = choose_metrics(args.metrics, sets, args.features)
    weights = args.features_weights if args.features else args.inception_weights
    network, made_by = load_network(args.features, args.protocol, weights)
    for source in sets:
        if source.moments and not made_by.startswith(source.made_by):
            raise SystemExit(
                f"{source.path}: mu and sigma are of {source.made_by}, not of {made_by}; "
                "--num and --ref-num take its images instead, if it has any"
            )

    # ADM's files do not say how many images mu and sigma come from.
    numbers = [len(source.features if source.moments else source.items) or None for source in sets] + [None]
    record = {
        "samples": args.samples,
        "num": numbers[0],
        "ref": args.ref,
        "ref_num": numbers[1],
        "by": made_by,
    }
    notes = [
        f"samples {args.samples}; num {numbers[0]}; ref {args.ref}; ref_num {numbers[1]}; by {made_by}; "
        f"fp32 on {args.device}"
    ]
    if any(number and number < 2048 for number in numbers):
        notes += ["FID of fewer than 2048 images is biased"]
    if len({source.shape for source in sets if source.items}) > 1:
        notes += ["the sets' images differ in size: --crop cuts the reference's"]
    if weights == "random":
        notes += ["an untrained network, as the demo's: its numbers compare with nothing"]
    print(*notes, sep="; ", file=sys.stderr)

    # Features are computed where no file holds them.
    for source in sets:
        # FID takes mu and sigma of ADM's files, which are of more images than the files hold.
        enough = len(source.features) or (source.moments and metrics == ["fid"])
        if source.items and not enough:
            source.features = extract(source, network, args.batch_size, args.workers, args.device)
            source.moments = source.moments or moments(source.features)
    results = evaluate(metrics, network, *sets)
    if args.json:
        print(json.dumps(results | record))
    else:
        for metric, value in results.items():
            print(f"{metric} {value:.6g}")
    if args.save_stats:
        save_statistics(args.save_stats, sets[0], made_by)


# ---- Flags ----


def parse_args(argv=None):
    """Parse the flags. Raises SystemExit, in one line, for flags and values that can't be meant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    # A mistake ends in one line.
    parser.error = lambda message: sys.exit(f"{parser.prog}: {message}; --help lists the flags")
    add = parser.add_argument

    # These flags choose the sets.
    add("samples", nargs="?", default="samples", help="the set to evaluate (%(default)s)")
    add("--ref", help="the set to compare with, imagenet256 or imagenet512 (that of samples/settings.json)")
    add("--crop", type=positive_int, help="centre-crop the reference to this size; without one, the samples")
    add("--num", type=positive_int, help="take the first so many samples (all; demo: 200)")
    add("--ref-num", type=positive_int, help="take so many of the reference, evenly spread (all; demo: 200)")

    # These flags choose the metrics and the features.
    add("--metrics", type=str.lower, help="some of fid,is,prec,rec (all that the sets allow)")
    add(
        "--protocol",
        choices=["adm", "pytorch-fid", "clean"],
        default="adm",
        help="from image to Inception's input (%(default)s)",
    )
    either = parser.add_mutually_exclusive_group().add_argument
    either("--inception-weights", default="hub", help="FILE, hub or, for tests, random (%(default)s)")
    either("--features", help="a timm model instead of Inception; vit_large_patch14_dinov2 gives FD-DINOv2")
    add("--features-weights", help="timm's FILE or hub:OWNER/REPO/PATH (timm's own)")

    # These flags change no result.
    add("--batch-size", type=positive_int, default=32, help="images a step; changes no result (%(default)s)")
    add("--workers", type=non_negative_int, default=8, help="threads that decode (%(default)s)")
    add(
        "--device",
        type=usable_device,
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cuda, cpu, mps, xpu (%(default)s)",
    )
    add("--save-stats", type=new_npz, help="write the samples' mu, sigma, features to a .npz: a later --ref")
    add("--json", action="store_true", help="one JSON line: numbers, sets, counts, what made the features")

    args = parser.parse_args(argv)
    if args.features_weights and not args.features:
        parser.error("--features-weights needs --features")

    # A flag that is given wins over these defaults.
    if not (args.ref or args.save_stats):
        parser.set_defaults(**defaults_of_samples(args.samples))
    args = parser.parse_args(argv)
    if not (args.ref or args.metrics or args.save_stats):
        parser.error("--ref is missing: the set to compare with; --metrics is (Inception Score) needs none")
    return args


def defaults_of_samples(folder):
    """Read in FOLDER/settings.json, which sample.py writes, what the samples are to be compared with."""
    path = Path(folder, "settings.json")
    settings = json.loads(path.read_bytes()) if path.exists() else {}
    if not settings.get("reference"):
        return {}
    # A whole path is no name of a reference batch.
    defaults = {"ref": os.path.abspath(settings["reference"]), "crop": settings["crop"]}
    return defaults | DEMO if settings["demo"] else defaults


def positive_int(text, least=1):
    """Convert the text of a flag to a whole number from 1."""
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text}")
    return number


def non_negative_int(text):
    """Convert the text of a flag to a whole number from 0."""
    return positive_int(text, least=0)


def usable_device(name):
    """Convert the text of a flag to a device of this machine."""
    try:
        return torch.empty(0, device=name).device
    # torch raises RuntimeError, and AssertionError where it was built without CUDA.
    except Exception:
        raise argparse.ArgumentTypeError(f"{name}: no such device on this machine") from None


def new_npz(path):
    """Convert the text of a flag to the path of an .npz that can be written and replaces no other file."""
    new = path.endswith(".npz") and not os.path.exists(path)
    if not (new and os.access(Path(path).parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{path}: expected a new .npz in a folder that can be written into")
    return path


# ---- Sets ----


class ImageSet:
    """An ImageSet is a folder of images, or an .npz of images, of statistics or of both.

    items: paths of images, or images (H,W,3). made_by: maker of the features that the moments are of.
    """

    shape = None  # (3,H,W) of all images
    moments = None  # mu (D,), sigma (D,D), float64
    features = ()  # (N,D), float32, where they are known

    def __init__(self, path, crop=None, num=None, spread=False):
        """Open a set. crop: see center_crop, or None.

        num: take so many images, the first or, with spread, evenly over their order.
        Raises SystemExit where the set can't be read or leaves nothing to evaluate.
        """
        self.path = path
        self.crop = crop
        self.items = []
        try:
            if path.endswith(".npz"):
                arrays = np.lib.npyio.NpzFile(path)
            else:
                arrays = {}
                self.items = list_images(path, set())
            if "arr_0" in arrays:
                self.items = list(map_npz(path))
            # mu and sigma are of all images, uncropped.
            if "mu" in arrays and not (num or crop):
                self.moments = (arrays["mu"], arrays["sigma"])
                # ADM's files do not say who made them.
                self.made_by = str(arrays.get("made_by", "adm inception"))
                if "features" in arrays:
                    self.features = torch.from_numpy(arrays["features"]).float()
        # The file system, zipfile and numpy raise many kinds.
        except Exception as error:
            sys.exit(
                f"{path}: {str(error)!r:.250}; the samples and --ref are folders of images, "
                "or whole .npz of arr_0, uncompressed, or of mu and sigma"
            )

        number = len(self.items)
        # A third neighbour must exist.
        if number < 4 and not self.moments:
            raise SystemExit(f"{path}: {number} images ({' '.join(EXTENSIONS)}), at least 4 are needed")
        if num:
            num = min(num, number)
            step = number / num if spread else 1
            self.items = [self.items[int(i * step)] for i in range(num)]
        # The Inception Score is of splits in this order: those of sorted classes would hold few classes each.
        if not path.endswith(".npz"):
            np.random.default_rng(0).shuffle(self.items)
        if self.items:
            self.shape = self.read(self.items[0]).shape

    def read(self, item):
        """Read an image -> uint8 (3,H,W). Raises SystemExit for one that can't be used."""
        if isinstance(item, np.ndarray):
            image = Image.fromarray(item)
        else:
            try:
                with Image.open(item) as file:
                    image = to_rgb(file)
            # Pillow's decoders raise many kinds.
            except Exception as error:
                sys.exit(f"{item!r}: not a readable image ({error!r}); repair or remove it")
        if self.crop:
            image = center_crop(image, self.crop)
        pixels = pil_to_tensor(image)
        if self.shape not in (None, pixels.shape):
            raise SystemExit(
                f"{item!r} is {[*pixels.shape]}, but {self.items[0]!r} is {[*self.shape]}; "
                "--crop makes those of the reference, or of the only set, equal"
            )
        return pixels


def choose_metrics(asked, sets, features):
    """Return the metrics that `asked` names, or all that the sets allow. Raises SystemExit for any other.

    sets: the samples and, where there is one, the reference.
    features: the name of a timm model, or None for Inception, which alone has classes.
    """
    by_image = [len(source.items or source.features) for source in sets]
    possible = []
    if len(sets) == 2:
        possible += ["fid"]
        if all(by_image):
            possible += ["prec", "rec"]
    if by_image[0] and not features:
        possible += ["is"]
    metrics = asked.split(",") if asked else possible
    if set(metrics) - set(possible):
        raise SystemExit(
            f"--metrics {asked}: these sets allow {','.join(possible) or 'none'}; "
            "fid needs --ref, is needs images and Inception, prec and rec need images of both sets"
        )
    return metrics


def save_statistics(path, source, made_by):
    """Write an .npz that ImageSet reads. A half-written one has another name."""
    mu, sigma = source.moments
    temporary = f"{path}.{os.getpid()}.npz"
    np.savez(temporary, mu=mu, sigma=sigma, features=source.features, made_by=made_by)
    os.replace(temporary, path)


# ---- Weights and files of others ----


def load_network(features, protocol, weights):
    """Load the network -> it, and what made its features: resize rule, name, digits of its weights' SHA-256.

    features: the name of a timm model, or None for Inception. weights: a file; `hub` or `random` for
    Inception; None for those that timm fetches. Raises SystemExit where they can't be had.
    """
    try:
        if features:
            network = TimmFeatures(features, read_weights(weights) if weights else None)
            made_by = f"224px {features}"
        else:
            network = Inception(protocol)
            made_by = f"{protocol} inception"
            if weights != "random":
                network.load_state_dict(read_weights(weights))
    # The hub, torch, safetensors and timm raise many kinds. torch's text, cut here, goes on to advise trust.
    except Exception as error:
        sys.exit(
            f"{features or 'Inception'} of {weights}: {error!r:.150}; "
            f"--features-weights takes timm's files, --inception-weights those of {URLS['hub']}"
        )

    # The digest is of the weights, not of a file: a local copy of the hub's is the same network.
    digest = hashlib.sha256()
    for value in network.state_dict().values():
        digest.update(value.numpy())
    return network if features else network.fold(), f"{made_by} {digest.hexdigest()[:8]}"


def read_weights(name):
    """Read the state dict in a .safetensors or .pt file, see local_file, without running code."""
    path = local_file(name)
    if path.endswith(".safetensors"):
        return load_file(path)
    # A plain dict may lack num_batches_tracked.
    return dict(torch.load(path, map_location="cpu", weights_only=True))


def local_file(name):
    """Return the path of a local copy of what `name` stands for: a key of URLS, hub:OWNER/REPO/PATH, a path.

    Copies are fetched once. Raises SystemExit where the file of a URL can't be had.
    """
    if name.startswith("hub:"):
        owner, repository, file = name[4:].split("/", 2)
        return hf_hub_download(f"{owner}/{repository}", file)
    if name not in URLS:
        return name

    url = URLS[name]
    folder = f"{torch.hub.get_dir()}/checkpoints"
    path = f"{folder}/{os.path.basename(url)}"
    if not os.path.exists(path):
        sys.stderr.write(f"fetching {url}\n")
        try:
            os.makedirs(folder, exist_ok=True)
            # The name of pytorch-fid's Inception ends in the first 8 digits of the file's SHA-256.
            torch.hub.download_url_to_file(url, path, url[-12:-4] if name == "hub" else None)
            # torch.hub does not notice that a file is cut; the list of an .npz's arrays is its end.
            if name != "hub":
                zipfile.ZipFile(path)
        # The network, the disk and the file raise many kinds.
        except Exception as error:
            Path(path).unlink(missing_ok=True)
            sys.exit(f"{url}: {error!r:.200}; the flag takes a FILE, too: a local copy")
    return path


# ---- Images ----

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
# Pillow refuses PNG text and colour profiles over 1 MB, though the picture is whole.
PngImagePlugin.MAX_TEXT_CHUNK = 2**28
PngImagePlugin.MAX_TEXT_MEMORY = 2**28


def list_images(folder, listed):
    """List the paths of all images below `folder`, each level in sorted order.

    Links are followed, and names that begin with a dot are skipped. listed: the real folders that were listed
    already; the new ones are added to it. Raises OSError where a folder can't be read.
    """
    paths = []
    real = os.path.realpath(folder)
    # A link to the folder itself or to a parent ends here.
    if real in listed:
        return paths
    listed.add(real)
    for name in sorted(os.listdir(folder)):
        path = f"{folder}/{name}"
        if name.startswith("."):
            continue
        if os.path.isdir(path):
            paths += list_images(path, listed)
        # Opening a named pipe waits for its writer.
        elif name.lower().endswith(EXTENSIONS) and not Path(path).is_fifo():
            paths += [path]
    return paths


def to_rgb(image):
    """Convert an open Pillow image to upright 8-bit RGB: 16 bits are scaled, transparency is laid on white.

    Raises whatever Pillow meets in broken pixels, and ValueError for a strip; broken metadata is passed over.
    """
    # Resizing the short side of a strip to the size of a crop would take gigabytes.
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels: more than 100 times as long as wide")
    image.load()
    # With in_place Pillow rotates the pixels before it parses, and may choke on, the rest of the metadata.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)

    # Pillow's own conversion of 16-bit grey clips at 255.
    if image.mode.startswith("I"):
        levels = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(levels.round().astype(np.uint8))

    if image.has_transparency_data:
        image = image.convert("RGBA")
        highest = image.getchannel("A").getextrema()[1]
        # Many 32-bit BMPs have an alpha that is 0 throughout: it is no alpha.
        if highest > 0:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image, size):
    """Cut the centre, size x size, out of a Pillow image as ADM evaluates (Dhariwal & Nichol 2021)."""
    # ADM halves first: one large bicubic step is of lower quality.
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width = round(image.width * scale)
    height = round(image.height * scale)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    return crop(image, (height - size) // 2, (width - size) // 2, size, size)


def map_npz(path):
    """Map arr_0 of an .npz, uint8 (N,H,W,3), where it lies in the file: its 10 GB need no memory.

    Raises ValueError where arr_0 is anything else, and whatever zipfile and numpy meet in a damaged file.
    """
    # The local zip header in front of the array has variable length; search for numpy's magic.
    header = zipfile.ZipFile(path).getinfo("arr_0.npy").header_offset
    with open(path, "rb") as file:
        file.seek(header)
        file.seek(header + file.read(512).find(b"\x93NUMPY"))
        np.lib.format.read_magic(file)
        shape, transposed, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.uint8 or transposed or shape[3:] != (3,) or 0 in shape:
            raise ValueError(f"arr_0 is {dtype} {shape}, not uint8 (N,H,W,3)")
        return np.memmap(file, np.uint8, "r", file.tell(), shape)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; nothing was written, the same command starts anew\n")
        os._exit(130)  # shells have 128 + SIGINT; sys.exit would wait for threads
