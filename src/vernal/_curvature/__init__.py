"""Derivatives, eigenvalues and singular values.

`matrices` and `matvec` have the users' functions of a tree of parameters, `eigen` those
of a matrix. Beneath them: `flat` differentiates with respect to a flat vector, `modes`
chooses forward or reverse mode, `singular` decomposes a Jacobian and `linalg` a matrix.
"""

from .eigen import decompose, eigen_projection
from .flat import (
    Expansion,
    checked_batch_size,
    expansion_of,
    gauss_newton_matrix,
    jacobian_of,
    spectrum_of,
)
from .linalg import (
    IndefiniteError,
    Matrix,
    after,
    as_real_square,
    descending,
    equilibrated_eigh,
    matmul,
    on_device,
    positive,
    refuse,
    refuse_non_finite,
)
from .matrices import gauss_newton, hessian, jacobian
from .matvec import MatrixFree, Product, gauss_newton_matvec, hessian_matvec
from .modes import (
    Flat,
    Mode,
    Subject,
    checked_mode,
    choose_mode,
    gauss_newton_products,
    gradient,
    hessian_matrix,
    hessian_product,
    in_reverse,
    jacobian_matrix,
    traced,
    transposed_product,
)
from .singular import Spectrum, column_norms, of_jacobian, square_factor
