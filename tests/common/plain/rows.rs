//! f32 tensors by rows.

use attn_kernels::reference::Array;

/// Rounding of an intermediate result to the dtype it is stored in.
pub type Round = fn(f32) -> f32;

/// `[batch, heads, rows, width]`
#[derive(Clone)]
pub struct Rows {
    pub shape: [usize; 4],
    data: Vec<f32>,
}

impl Rows {
    pub fn zeros(shape: [usize; 4]) -> Self {
        Self { shape, data: vec![0.0; shape.iter().product()] }
    }

    pub fn new(array: &Array) -> Self {
        Self { shape: array.shape, data: array.data.iter().map(|&x| x as f32).collect() }
    }

    pub fn array(&self) -> Array {
        Array { data: self.data.iter().map(|&x| x.into()).collect(), shape: self.shape }
    }

    fn start(&self, [b, h, i]: [usize; 3]) -> usize {
        ((b * self.shape[1] + h) * self.shape[2] + i) * self.shape[3]
    }

    pub fn row(&self, at: [usize; 3]) -> &[f32] {
        &self.data[self.start(at)..][..self.shape[3]]
    }

    pub fn row_mut(&mut self, at: [usize; 3]) -> &mut [f32] {
        let start = self.start(at);
        &mut self.data[start..][..self.shape[3]]
    }

    /// Indices of all rows.
    pub fn indices(&self) -> impl Iterator<Item = [usize; 3]> + use<> {
        let [batch, heads, rows, _] = self.shape;
        (0..batch).flat_map(move |b| (0..heads).flat_map(move |h| (0..rows).map(move |i| [b, h, i])))
    }

    pub fn add(&mut self, index: usize, x: f32) {
        self.data[index] += x;
    }

    pub fn round(mut self, round: Round) -> Self {
        self.data.iter_mut().for_each(|x| *x = round(*x));
        self
    }
}

/// Inner product in one sum.
pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

pub fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}
