//! Recurrences whose numbers do not mix: diagonal state-space models (S4D, S5, LRU, Mamba) and discounted sums.

/// Choices of `diagonal_scan`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScanOptions {
    /// Whether steps are taken from the last to the first: h_t = a_t ⊙ h_{t+1} + b_t. Default: no.
    pub reversed: bool,
}

/// Choices of `selective_scan`.
#[derive(Debug, Clone)]
pub struct SelectiveScanOptions<T> {
    /// D, `[C]` in the dtype of sums: D ⊙ u is added to the output. Default: nothing.
    pub skip: Option<T>,
}

impl<T> Default for SelectiveScanOptions<T> {
    fn default() -> Self {
        Self { skip: None }
    }
}

/// A of HiPPO-LegS (Gu et al. 2020), n × n row-major, and its B, for h′ = A h + B u:
///
/// ```text
/// A_ij = −√((2i + 1)(2j + 1)) for i > j,   −(i + 1) for i = j,   0 else;   B_i = √(2i + 1)
/// ```
///
/// # Example
/// ```
/// let [a, b] = attn_kernels::hippo_legs(2);
/// assert_eq!((a, b), (vec![-1.0, 0.0, -3f64.sqrt(), -2.0], vec![1.0, 3f64.sqrt()]));
/// ```
pub fn hippo_legs(n: usize) -> [Vec<f64>; 2] {
    let root = |i: usize| (2.0 * i as f64 + 1.0).sqrt();
    let entry = |i: usize, j: usize| match i.cmp(&j) {
        std::cmp::Ordering::Greater => -root(i) * root(j),
        std::cmp::Ordering::Equal => -(i as f64 + 1.0),
        std::cmp::Ordering::Less => 0.0,
    };
    [(0..n * n).map(|at| entry(at / n, at % n)).collect(), (0..n).map(root).collect()]
}

/// The initial values of S4D-Lin (Gu et al. 2022): λ_n = −½ + iπn, real and imaginary parts.
///
/// # Example
/// ```
/// assert_eq!(attn_kernels::s4d_lin(2), [[-0.5, 0.0], [-0.5, std::f64::consts::PI]]);
/// ```
pub fn s4d_lin(n: usize) -> Vec<[f64; 2]> {
    (0..n).map(|n| [-0.5, std::f64::consts::PI * n as f64]).collect()
}
