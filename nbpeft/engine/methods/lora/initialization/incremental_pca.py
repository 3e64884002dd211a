"""Principal components of rows in batches (Ross et al. 2008), like scikit-learn's ``IncrementalPCA``.

For each batch, the previous components (times their singular values), the centred batch and one row for the shift of
the mean are decomposed together, so the memory is that of one batch, independent of the number of earlier batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Self

import torch
from torch import Tensor

from nbpeft.errors import ConfigError

_ROWS_PER_FEATURE = 5
"""Default number of rows per feature in a batch of ``fit``."""


class IncrementalPCA:
    """Principal components of batches of rows. Arguments and attributes as in PEFT.

    Args:
        n_components: components to keep; as many as the first batch allows if None.
        copy: ignored, accepted as in PEFT: batches are never changed.
        batch_size: rows of a batch of ``fit``; five per feature if None.
        svd_driver: driver of ``torch.linalg.svd`` on CUDA.
        lowrank: decompose by ``torch.svd_lowrank``, which is faster for few components.
        lowrank_q: ``q`` of ``torch.svd_lowrank``; twice the components if None.
        lowrank_niter: its iterations.
        lowrank_seed: seed of its random draws; the global generator is restored afterwards.

    Attributes:
        components_: (n_components, features), after the first batch.
        singular_values_: (n_components,).
        explained_variance_: (n_components,).
        explained_variance_ratio_: (n_components,), shares of the whole variance.
        mean_: (features,), float64.
        var_: (features,), float64.
        n_samples_seen_: number of rows so far, a tensor with one element.
        noise_variance_: mean variance of the components that were left out.

    Raises:
        ConfigError: the arguments contradict each other.
    """

    components_: Tensor
    singular_values_: Tensor
    explained_variance_: Tensor
    explained_variance_ratio_: Tensor
    noise_variance_: Tensor

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        if lowrank and n_components is None and lowrank_q is None:
            raise ConfigError("n_components must be specified when using lowrank mode with lowrank_q=None.")
        if lowrank and lowrank_q is None:
            lowrank_q = 2 * (n_components or 0)
        if lowrank and lowrank_q is not None and lowrank_q < (n_components or 0):
            raise ConfigError("lowrank_q must be greater than or equal to n_components.")
        self.n_components, self.copy, self.batch_size = n_components, copy, batch_size
        self.svd_driver, self.lowrank, self.lowrank_q = svd_driver, lowrank, lowrank_q
        self.lowrank_niter, self.lowrank_seed = lowrank_niter, lowrank_seed
        self.n_features_: int | None = None
        self.n_samples_seen_: Any = 0
        self.mean_: Tensor | None = None
        self.var_: Tensor | None = None

    def fit(self, X: Any, check_input: bool = True) -> Self:
        """Fits rows (samples, features), batch by batch.

        Raises:
            ConfigError: there are fewer rows or features than components.
        """
        rows = self._checked(X) if check_input else X
        if self.batch_size is None:
            self.batch_size = _ROWS_PER_FEATURE * rows.shape[1]
        for batch in self.gen_batches(rows.shape[0], self.batch_size, min_batch_size=self.n_components or 0):
            self.partial_fit(rows[batch], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> Self:
        """Updates the components with one more batch (samples, features).

        Raises:
            ConfigError: the batch has fewer rows than components, or another number of features than earlier batches.
        """
        rows = self._checked(X) if check_input else X
        count, features = rows.shape
        if self.n_features_ is None:
            self.n_features_ = features
            self.n_components = self.n_components or min(count, features)
        if features != self.n_features_:
            raise ConfigError(f"the number of features of the new batch is {features}, of the first {self.n_features_}")
        mean = rows.mean(0, dtype=torch.float64)
        centred = rows - mean.to(rows.dtype)
        seen, total = int(self.n_samples_seen_), int(self.n_samples_seen_) + count
        squares = centred.square().sum(0, dtype=torch.float64)
        if self.mean_ is None or self.var_ is None:
            new_mean, new_var = mean, squares / count
        else:
            shift = (mean - self.mean_) * math.sqrt(seen / total * count)
            new_mean = (self.mean_ * seen + mean * count) / total
            new_var = (self.var_ * seen + squares + shift.square()) / total
            known = self.singular_values_[:, None] * self.components_
            centred = torch.cat([known, centred, shift[None]])  # float64 from here on
        _, values, right = self._decomposed(centred)
        self._keep(values, _signed(right), new_mean, new_var, total, count)
        return self

    def _keep(self, values: Tensor, right: Tensor, mean: Tensor, var: Tensor, total: int, count: int) -> None:
        kept = self.n_components
        assert kept is not None
        variances = values.square() / (total - 1)
        self.mean_, self.var_ = mean, var
        self.n_samples_seen_ = torch.tensor([total], device=values.device)
        self.components_, self.singular_values_ = right[:kept], values[:kept]
        self.explained_variance_ = variances[:kept]
        self.explained_variance_ratio_ = (values.square() / (var * total).sum())[:kept]
        complete = kept in (count, self.n_features_)
        self.noise_variance_ = variances.new_zeros(()) if complete else variances[kept:].mean()

    def transform(self, X: Tensor) -> Tensor:
        """Projects rows (samples, features) onto the components: (samples, n_components)."""
        assert self.mean_ is not None, "nothing was fitted"
        centred = X - self.mean_
        return torch.mm(centred.double(), self.components_.double().T).to(centred.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of ``batch_size`` rows; the last slice may be shorter, or longer if it would be too short otherwise.

        Args:
            n: number of rows.
            batch_size: rows of a slice.
            min_batch_size: minimum number of rows of the last slice.
        """
        start = 0
        while start + batch_size + min_batch_size <= n:
            yield slice(start, start + batch_size)
            start += batch_size
        if start < n:
            yield slice(start, n)

    def _checked(self, X: Any) -> Tensor:
        given = isinstance(X, Tensor)
        rows: Tensor = X if given else torch.tensor(X, dtype=torch.float32)
        count, features = rows.shape
        if self.n_components is not None and self.n_components > features:
            raise ConfigError(
                f"n_components={self.n_components} invalid for n_features={features}, need more rows than columns "
                "for IncrementalPCA processing."
            )
        if self.n_components is not None and self.n_components > count:
            raise ConfigError(
                f"n_components={self.n_components} must be less or equal to the batch number of samples {count}"
            )
        return rows if rows.dtype in (torch.float32, torch.float64) else rows.float()

    def _decomposed(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.lowrank:
            left, values, right = torch.linalg.svd(rows, full_matrices=False, driver=self.svd_driver)
            return left, values, right
        seeded = self.lowrank_seed is not None
        with torch.random.fork_rng(enabled=seeded):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            left, values, right = torch.svd_lowrank(rows, q=self.lowrank_q, niter=self.lowrank_niter)
        return left, values, right.mH


def _signed(right: Tensor) -> Tensor:
    """Right singular vectors, each with a sign that makes its largest entry positive."""
    largest = right.gather(1, right.abs().argmax(1, keepdim=True))
    return right * torch.sign(largest)
