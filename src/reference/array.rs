/// A contiguous four-dimensional f64 tensor, mostly `[batch, heads, rows, width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// Elements, the last dimension fastest.
    pub data: Vec<f64>,
    /// Sizes of the dimensions.
    pub shape: [usize; 4],
}

impl Array {
    /// All zeros.
    pub fn zeros(shape: [usize; 4]) -> Self {
        Self::filled(shape, 0.0)
    }

    /// All `value`.
    pub fn filled(shape: [usize; 4], value: f64) -> Self {
        Self { data: vec![value; shape.iter().product()], shape }
    }

    /// The element at index `[b, h, i, d]` is `element([b, h, i, d])`; called in the order of `data`.
    pub fn from_fn(shape: [usize; 4], mut element: impl FnMut([usize; 4]) -> f64) -> Self {
        let mut data = Vec::with_capacity(shape.iter().product());
        for b in 0..shape[0] {
            for h in 0..shape[1] {
                for i in 0..shape[2] {
                    data.extend((0..shape[3]).map(|d| element([b, h, i, d])));
                }
            }
        }
        Self { data, shape }
    }

    /// Row `[b, h, i, ..]`.
    ///
    /// # Panics
    /// If the row lies outside the shape.
    pub fn row(&self, b: usize, h: usize, i: usize) -> &[f64] {
        let start = self.row_start(b, h, i);
        &self.data[start..start + self.shape[3]]
    }

    /// Row `[b, h, i, ..]`, to be written.
    ///
    /// # Panics
    /// If the row lies outside the shape.
    pub fn row_mut(&mut self, b: usize, h: usize, i: usize) -> &mut [f64] {
        let start = self.row_start(b, h, i);
        &mut self.data[start..start + self.shape[3]]
    }

    fn row_start(&self, b: usize, h: usize, i: usize) -> usize {
        let [batch, heads, rows, width] = self.shape;
        assert!(b < batch && h < heads && i < rows, "row [{b}, {h}, {i}] of an array of shape {:?}", self.shape);
        ((b * heads + h) * rows + i) * width
    }
}

/// Σ_a x_a y_a, in four sums, so that no addition waits for the one before.
pub(super) fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut sums = [0.0; 4];
    for (x, y) in x.chunks(4).zip(y.chunks(4)) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += x * y;
        }
    }
    sums.iter().sum()
}

/// y ← y + a·x
pub(super) fn add_scaled(y: &mut [f64], a: f64, x: &[f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += a * x;
    }
}

/// Refuses `array` unless its shape is `needs`.
pub(super) fn assert_shape(name: &str, array: &Array, needs: [usize; 4]) {
    assert_eq!(array.shape, needs, "shape of {name}");
    assert_eq!(array.data.len(), needs.iter().product::<usize>(), "number of elements of {name}");
}
