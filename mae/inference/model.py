"""Trained model, ready to use: features, predictions, reconstructions, attention."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mae import keyed
from mae.data.loader import normalize
from mae.data.statistics import PixelStatistics
from mae.errors import BadImageError, UserError
from mae.export.exporting import Exported, export_model
from mae.export.trained_model import TrainedModel, require_our_norms
from mae.formats.norms import take_norms
from mae.formats.opening import Normalization, StoredModel, open_model
from mae.inference.inputs import Picture, Pictures, each_of, encoded, view_of
from mae.inference.prediction import Prediction, most_probable
from mae.inference.reconstruction import Reconstructed, chosen_mask, reconstructed
from mae.keyed import Purpose
from mae.models.attention import attention_weights
from mae.models.autoencoder import MaskedAutoencoder
from mae.models.description import ModelDescription
from mae.models.network import build_network
from mae.models.readout import NORMS, NormKind, encode_all, features_of_tokens, read_features, select
from mae.models.selection import Selection, read_selection
from mae.models.vit import TokenKind
from mae.models.weights import file_tensors, require_finite
from mae.output import say
from mae.settings import check

BATCH = 64
"""Number of images that go through the model at once. It is fixed, because other numbers change the last bits."""


def load(
    source: str | PathLike[str],
    device: str | torch.device | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    heads: int | None = None,
) -> "Model":
    """Load a trained model for use: `mae.load("runs/first")`.

    Args:
        source: The folder of a run, of a checkpoint or of an export, or a `.safetensors` file of this program; a folder
            or a file of timm, transformers, torchvision or the original MAE code; `hub:OWNER/NAME` or `timm:NAME`. Of a
            fine-tuning run that measured its accuracy, the best model is taken.
        device: Where the model computes; None: on a GPU if there is one, else on the CPU.
        mean: Mean of each channel on a scale of 0 to 1, for a model that does not say its own.
        std: Standard deviation of each channel, likewise.
        heads: Number of attention heads, for a model that does not say its own.

    Raises:
        UserError: if there is no model, it is damaged, it is of a kind that cannot be read, or it does not say how its
            images were normalised and nothing else does.
    """
    if (mean is None) != (std is None):
        raise UserError("mean and std are given together, or not at all")
    given = None if mean is None or std is None else Normalization(tuple(map(float, mean)), tuple(map(float, std)))
    return load_stored(open_model(source, given, heads, best=True), device)


def load_stored(stored: StoredModel, device: str | torch.device | None = None) -> "Model":
    """Load a model that is open, as `load` does.

    Raises:
        UserError: if its tensors are not those of its description or not finite, or it does not say how its images were
            normalised.
    """
    path, description = stored.path, stored.require_normalization().description
    require_finite(stored.weights, path)
    network = build_network(description, stored.weights, path)
    take_norms(network, stored)
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    selection = read_selection(path) if stored.is_ours else None
    return Model(path, description, selection, network.eval().to(chosen), chosen, replace(stored, tensors={}))


@dataclass(frozen=True)
class Model:
    """Trained model. Its methods take one or many images, of any kind that `mae.inference.inputs.Picture` names.

    Images are decoded, resized and cropped at the centre as in evaluation, and normalised as in training.
    """

    path: Path
    """File that the weights are from."""
    description: ModelDescription
    selection: Selection | None
    """Evaluation samples on which the model was chosen as the best of its run; None if it was not, or is unknown."""
    network: VisionTransformer | MaskedAutoencoder
    device: torch.device
    stored: StoredModel | None = field(default=None, repr=False, compare=False)
    """Files that hold it; None for a model that is in none."""

    @property
    def encoder(self) -> VisionTransformer:
        """Encoder: a timm ViT, with a head if the model is a classifier."""
        network = self.network
        return network.encoder if isinstance(network, MaskedAutoencoder) else network

    @cached_property
    def sha256(self) -> str:
        """Hash of the file; of a model of another library, of its files and of its description."""
        assert self.stored is not None
        return self.stored.sha256

    @property
    def has_head(self) -> bool:
        """Whether the model predicts classes."""
        return isinstance(self.network, VisionTransformer) and self.network.num_classes > 0

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes by label; their numbers where the model knows no names, and () without a head."""
        count: int = self.network.num_classes if isinstance(self.network, VisionTransformer) else 0
        return self.description.class_names(count)

    def view(self, image: Picture) -> UInt8[Tensor, "channels height width"]:
        """Return an image as the model sees it, before it is normalised: resized, and cropped at the centre.

        Raises:
            UserError: if the image cannot be read.
            BadImageError: if it is damaged or of a format that is not allowed.
        """
        return view_of(encoded(image, self.description.value_range is not None), self.description)

    def embed(
        self, images: Pictures, tokens: TokenKind = "cls", norm: NormKind = "normed"
    ) -> Float32[Tensor, "images feature"]:
        """Return one feature per image: width values, or twice as many for `cls+avg`.

        Args:
            images: One or many images.
            tokens: `cls`, the mean of the patch tokens (`avg`), or both, one after the other (`cls+avg`).
            norm: Tokens before (`raw`) or after (`normed`) the encoder's last norm. `cls` and `normed` is what a timm
                model gives, and what fine-tuning builds on; k-NN is often better with `raw`.

        Raises:
            UserError: if an image cannot be used, or there are no such tokens or norm.
        """
        check(tokens in get_args(TokenKind), "tokens", tokens, ", ".join(get_args(TokenKind)))
        check(norm in NORMS, "norm", norm, ", ".join(NORMS))
        return torch.cat([select(features, tokens, norm) for features in self._run(self.features_of, images)])

    def logits(self, images: Pictures) -> Float32[Tensor, "images classes"]:
        """Return the logits of a fine-tuned model.

        Raises:
            UserError: if the model has no head, or an image cannot be used.
        """
        self.require_head()
        return torch.cat(list(self._run(self.logits_of, images)))

    def predict(self, images: Pictures, top: int = 5) -> list[Prediction]:
        """Return the `top` most probable classes of each image.

        Raises:
            UserError: if the model has no head, an image cannot be used, or `top` is less than 1.
        """
        return most_probable(self.logits(images), self.classes, top)

    def reconstruct(
        self,
        images: Pictures,
        mask_ratio: float | None = None,
        seed: int = 0,
        hidden: Bool[Tensor, "images rows columns"] | Bool[np.ndarray, "images rows columns"] | None = None,
    ) -> Reconstructed:
        """Hide patches of each image, and reconstruct it from the others.

        Args:
            images: One or many images.
            mask_ratio: Share of the patches to hide; None: as in training.
            seed: Key of the random masks; the n-th image has the same mask in each call.
            hidden: Masks of your own, True for each patch to hide, with the same number for each image.

        Raises:
            UserError: if the model has no decoder, an image cannot be used, or a mask hides no patch or all.
        """
        network = self.network
        if not isinstance(network, MaskedAutoencoder):
            raise UserError(f"{self.path} has no decoder, so it cannot reconstruct images; give a pretraining run")
        parts, done = [], 0
        for views in self._batches(images):
            ids = np.arange(done, done + len(views))
            noise = keyed.uniform_float32(keyed.key(Purpose.PICTURE, seed), ids, network.patches)
            own = None if hidden is None else torch.as_tensor(hidden[done : done + len(views)])
            mask = chosen_mask(network, torch.from_numpy(noise).to(self.device), mask_ratio, own)
            parts.append(reconstructed(network, self._normalized(views), mask, self._statistics))
            done += len(views)
        if hidden is not None and len(hidden) != done:
            raise UserError(f"there are {len(hidden)} masks for {done} images; give one mask for each image")
        return Reconstructed(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def attention(self, images: Pictures, block: int = -1) -> Float32[Tensor, "images heads rows columns"]:
        """Return how much the cls token attends to each patch in one block, per head.

        The weights of one head sum to 1 with the weight of the cls token itself, which is left out.

        Raises:
            UserError: if an image cannot be used, or there is no such block.
        """
        depth = self.description.depth
        if not -depth <= block < depth:
            raise UserError(f"there is no block {block}; allowed: {-depth} to {depth - 1}")

        def weights(views: UInt8[Tensor, "batch channels height width"]) -> Float32[Tensor, "batch ..."]:
            with torch.no_grad():
                found = attention_weights(self.encoder, self._normalized(views), block)
            return found[:, :, 0, 1:].reshape(*found.shape[:2], *self.description.grid).cpu()

        return torch.cat(list(self._run(weights, images)))

    def export(self, to: str | Sequence[str] = "timm", out: str | PathLike[str] | None = None) -> list[Exported]:
        """Write the model for other libraries, as `mae export` does; see `mae.export.exporting.export_model`.

        Args:
            to: One or several names of targets, such as `timm`, `transformers` and `onnx`; or `all`.
            out: New folder: of one target the export itself, of several the folder of one folder for each target. None:
                `export-TARGET` beside the model; see `mae.formats.opening.StoredModel.beside`.

        Raises:
            UserError: if a target cannot hold the model, or loads it with other outputs.
        """
        assert self.stored is not None
        require_our_norms(self.stored)
        weights = {name: tensor.float().cpu() for name, tensor in file_tensors(self.network).items()}
        model = TrainedModel(self.path, self.description, weights, self.sha256, self.stored)
        return export_model(model, [to] if isinstance(to, str) else to, None if out is None else Path(out), say)

    def require_head(self) -> None:
        """Raise a `UserError` if the model has no head."""
        if not self.has_head:
            raise UserError(
                f"{self.path} is an encoder, which knows no classes: get its features (mae embed), or fine-tune it "
                "first (mae finetune)"
            )

    def features_of(self, views: UInt8[Tensor, "batch channels height width"]) -> Float32[Tensor, "batch norms both"]:
        """Return all features of a batch of views; see `mae.models.readout.read_features`."""
        with torch.no_grad():
            return read_features(self.encoder, self._normalized(views)).float().cpu()

    def logits_of(self, views: UInt8[Tensor, "batch channels height width"]) -> Float32[Tensor, "batch classes"]:
        """Return the logits of a batch of views."""
        with torch.no_grad():
            logits: Tensor = self.encoder(self._normalized(views))
            return logits.float().cpu()

    def features_and_logits_of(
        self, views: UInt8[Tensor, "batch channels height width"]
    ) -> tuple[Float32[Tensor, "batch norms both"], Float32[Tensor, "batch classes"]]:
        """Return all features and the logits of a batch of views, which are encoded once."""
        with torch.no_grad():
            raw = encode_all(self.encoder, self._normalized(views))
            logits: Tensor = self.encoder.forward_head(self.encoder.norm(raw))
            return features_of_tokens(self.encoder, raw).float().cpu(), logits.float().cpu()

    @property
    def _statistics(self) -> PixelStatistics:
        return PixelStatistics(self.description.mean, self.description.std)

    def _normalized(
        self, views: UInt8[Tensor, "batch channels height width"]
    ) -> Float32[Tensor, "batch channels height width"]:
        return normalize(views.to(self.device), self._statistics)

    def _run(self, function: Callable[[Tensor], Tensor], images: Pictures) -> Iterator[Tensor]:
        return map(function, self._batches(images))

    def _batches(self, images: Pictures) -> Iterator[UInt8[Tensor, "batch channels height width"]]:
        views: list[Tensor] = []
        number = -1
        for number, image in enumerate(each_of(images)):
            try:
                views.append(self.view(image))
            except BadImageError as error:
                name = image if isinstance(image, str | PathLike) else f"image {number}"
                raise UserError(f"{name} is not usable: {error}") from None
            if len(views) == BATCH:
                yield torch.stack(views)
                views.clear()
        if number < 0:
            raise UserError("there are no images; give at least one")
        if views:
            yield torch.stack(views)
