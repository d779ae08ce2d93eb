"""Inception score from sums over chunks of consecutive images, as ADM's evaluator splits them.

Memory depends on the number of chunks only. Must not know the network that gives the logits.

Letters: B batch, C classes.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .processes import sum_over_processes


class InceptionScore:
    """Streaming inception score (Salimans et al. 2016): `exp(mean KL(p(y|x) || p(y)))`, in float64.

    The score is the mean over chunks of consecutive image indices, each with a `p(y)` of its own; the last chunk may be
    shorter. It depends on which images share a chunk, so scores of other numbers of images compare badly.

    Args:
        count: Number of images.
        num_classes: C; 1008 for the FID Inception.
        chunk_size: Images per chunk.
        device: Where the sums are kept; it must support float64, which MPS does not.

    Attributes:
        seen: `(chunks,)` int64, images that came.
        probabilities: `(chunks, C)` float64, sums of `p`.
        negentropies: `(chunks,)` float64, sums of `p log p` over images and classes.
    """

    def __init__(
        self, count: int, num_classes: int = 1008, chunk_size: int = 5000, device: torch.device | str = "cpu"
    ) -> None:
        starts = range(0, count, chunk_size)
        self.count, self.chunk_size = count, chunk_size
        self._expected = [min(chunk_size, count - start) for start in starts]
        self.seen = torch.zeros(len(starts), dtype=torch.int64, device=device)
        self.probabilities = torch.zeros(len(starts), num_classes, dtype=torch.float64, device=device)
        self.negentropies = torch.zeros(len(starts), dtype=torch.float64, device=device)

    @property
    def chunks(self) -> int:
        """Number of chunks, over which `score` takes mean and deviation."""
        return len(self._expected)

    @torch.no_grad()
    def update(self, logits: Tensor, indices: Sequence[int]) -> None:
        """Add a batch.

        Args:
            logits: `(B, C)`, any floating point dtype, on any device.
            indices: Which images they are of, each in [0, count).

        Raises:
            ValueError: The logits have another shape, or an index is out of range.
        """
        expected, got = (len(indices), self.probabilities.shape[1]), tuple(logits.shape)
        if got != expected:
            raise ValueError(f"expected logits {expected} of {len(indices)} images, got {got}")
        if not all(0 <= index < self.count for index in indices):
            raise ValueError(f"expected image indices in [0, {self.count}), got {min(indices)} to {max(indices)}")
        device = self.seen.device
        chunks = torch.tensor(indices, dtype=torch.int64).to(device) // self.chunk_size
        log_p = logits.to(device, torch.float64).log_softmax(dim=1)
        p = log_p.exp()
        self.seen.index_add_(0, chunks, torch.ones_like(chunks))
        self.probabilities.index_add_(0, chunks, p)
        self.negentropies.index_add_(0, chunks, (p * log_p).sum(dim=1))

    def reduce(self) -> None:
        """Make these the sums of all processes' images, on every process; a collective, to be called once."""
        for tensor in self._tensors().values():
            sum_over_processes(tensor)

    def state(self) -> dict[str, Tensor]:
        """Copies of the sums on the CPU, for safetensors: `seen`, `probabilities` and `negentropies`."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._tensors().items()}

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Add what another attempt or process saw.

        Args:
            state: What `state` gave there.

        Raises:
            ValueError: It is of another number of chunks or classes.
        """
        tensors = self._tensors()
        for name, tensor in tensors.items():
            if state[name].shape != tensor.shape:
                expected, got = tuple(tensor.shape), tuple(state[name].shape)
                raise ValueError(f"expected {name} {expected} of the inception score, got {got}")
        for name, tensor in tensors.items():
            tensor += state[name].to(tensor)

    def score(self) -> tuple[float, float]:
        """Mean and population standard deviation over the chunks.

        Returns:
            Both; the deviation of a single chunk is 0.

        Raises:
            ValueError: Not all images came, or logits were not finite.
        """
        if self.seen.tolist() != self._expected or not self._expected:
            raise ValueError(f"expected {self.count} images in chunks of {self._expected}, got {self.seen.tolist()}")
        n = self.seen.double()
        marginal = self.probabilities / n[:, None]
        divergence = self.negentropies / n - torch.xlogy(marginal, marginal).sum(dim=1)
        if not divergence.isfinite().all():
            raise ValueError("the logits are not all finite, so there is no inception score: look at the images")
        scores = divergence.exp()
        return scores.mean().item(), scores.std(correction=0).item()

    def _tensors(self) -> dict[str, Tensor]:
        return {"seen": self.seen, "probabilities": self.probabilities, "negentropies": self.negentropies}
