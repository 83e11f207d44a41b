//! f32 matrices, row-major.

use crate::common::tensor::Float;

#[derive(Debug, Clone)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f32>,
}

impl Matrix {
    pub fn zeros(rows: usize, cols: usize) -> Self {
        Self { rows, cols, data: vec![0.0; rows * cols] }
    }

    pub fn from_rows<'a>(rows: impl Iterator<Item = &'a [f64]>, cols: usize) -> Self {
        let data: Vec<f32> = rows.flatten().map(|&x| x as f32).collect();
        Self { rows: data.len() / cols, cols, data }
    }

    pub fn from_fn(rows: usize, cols: usize, element: impl Fn(usize, usize) -> f32) -> Self {
        let data = (0..rows).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| element(i, j)).collect();
        Self { rows, cols, data }
    }

    pub fn row(&self, i: usize) -> &[f32] {
        &self.data[i * self.cols..][..self.cols]
    }

    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        &mut self.data[i * self.cols..][..self.cols]
    }

    pub fn get(&self, i: usize, j: usize) -> f32 {
        self.data[i * self.cols + j]
    }

    pub fn rounded(mut self, float: Float) -> Self {
        self.data.iter_mut().for_each(|x| *x = float.round(*x));
        self
    }

    pub fn scaled(mut self, factor: f32) -> Self {
        self.data.iter_mut().for_each(|x| *x *= factor);
        self
    }

    pub fn plus(mut self, other: &Self) -> Self {
        self.data.iter_mut().zip(&other.data).for_each(|(x, y)| *x += y);
        self
    }

    pub fn times_elements(mut self, other: &Self) -> Self {
        self.data.iter_mut().zip(&other.data).for_each(|(x, y)| *x *= y);
        self
    }

    pub fn transposed(&self) -> Self {
        Self::from_fn(self.cols, self.rows, |i, j| self.get(j, i))
    }

    /// self · other
    pub fn times(&self, other: &Self) -> Self {
        let mut product = Self::zeros(self.rows, other.cols);
        for i in 0..self.rows {
            for (j, &x) in self.row(i).iter().enumerate() {
                add_scaled(product.row_mut(i), x, other.row(j));
            }
        }
        product
    }
}

/// y ← y + a·x
pub fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += a * x);
}

pub fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}
