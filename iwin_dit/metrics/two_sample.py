"""Metrics that compare two sets of images one by one: KID, precision and recall.

Thin calls of torch-fidelity, which this file alone imports (extra "eval"); the images' features are given, so that its
networks, caches and random state play no part. Must not know where features come from.

Letters: N images of a set, D features.
"""

from torch import Tensor

_BLOCK = 1 << 24  # distances held at a time


def kernel_inception_distance(
    fake: Tensor, real: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018): unbiased squared MMD of the kernel `(x.y / D + 1)^3`.

    It is computed in the features' dtype; float32 rounds it at about 1e-7. Unbiased, it may be negative.

    Args:
        fake: `(N, D)` features of the generated images, on the CPU.
        real: `(N', D)` features of the reference.
        subsets: Pairs of random subsets.
        subset_size: Images of each; where a set is smaller, the size of the smaller set.
        seed: Of the subsets.

    Returns:
        Mean and population standard deviation over the pairs.

    Raises:
        ValueError: A set has fewer than two images, the sizes of the features differ, or they are not finite.
        ImportError: torch-fidelity is not installed.
    """
    try:
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    except ImportError as error:
        raise ImportError('KID needs torch-fidelity: pip install "iwin-dit[eval]"') from error
    _check(fake, real, at_least=2)
    result = kid_features_to_metric(
        fake,
        real,
        kid_subsets=subsets,
        kid_subset_size=min(subset_size, len(fake), len(real)),
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_gamma=None,  # 1 / D
        kid_kernel_poly_coef0=1,
        rng_seed=seed,
        verbose=False,
    )
    return result[KEY_METRIC_KID_MEAN], result[KEY_METRIC_KID_STD]


def precision_recall(fake: Tensor, real: Tensor, *, neighbours: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019).

    Precision is the fraction of generated images within the manifold of the reference, the balls that reach from each
    of its images to the `neighbours`-th nearest other; recall is the converse. Distances are computed in the features'
    dtype (ADM's evaluator takes float16 where it can), in blocks of rows on the features' device; what a block needs,
    about 5 * 64 MB for float32, is all that is added to the features, unless a row of distances alone is longer.

    Args:
        fake: `(N, D)` features of the generated images.
        real: `(N', D)` features of the reference, on the same device.
        neighbours: Which neighbour bounds a ball.

    Returns:
        Precision and recall.

    Raises:
        ValueError: A set has no more images than `neighbours`, the sizes of the features differ, or they are not
            finite.
        ImportError: torch-fidelity is not installed.
    """
    try:
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric
    except ImportError as error:
        raise ImportError('precision and recall need torch-fidelity: pip install "iwin-dit[eval]"') from error
    _check(fake, real, at_least=neighbours + 1)
    result = prc_features_to_metric(
        fake,
        real,
        prc_neighborhood=neighbours,
        prc_batch_size=max(1, _BLOCK // max(len(fake), len(real))),
        save_cpu_ram=True,  # otherwise all N x N' distances at once: 10 GB for 50,000 images
        verbose=False,
    )
    return result[KEY_METRIC_PRECISION], result[KEY_METRIC_RECALL]


def _check(fake: Tensor, real: Tensor, at_least: int) -> None:
    """Refuse features that have no such metric."""
    if min(len(fake), len(real)) < at_least:
        raise ValueError(f"expected at least {at_least} images on each side, got {len(fake)} fake, {len(real)} real")
    if fake.ndim != 2 or fake.shape[1:] != real.shape[1:]:
        raise ValueError(f"expected features (N, D) of the same D, got {tuple(fake.shape)} and {tuple(real.shape)}")
    if not (fake.sum().isfinite() and real.sum().isfinite()):  # without the temporaries of an elementwise test
        raise ValueError("the features are not all finite: look at the images")
