//! A token's own key in an exclusive read: ⟨q_t, u ⊙ k_t⟩ on the diagonal of the products of queries and keys.

use super::super::buffer::Buffer;
use super::super::rows::Number;
use super::{CHUNK, Context, StateHead};

/// The bonus in a chunk.
pub struct Bonus<T> {
    /// u ⊙ k
    keys: Buffer<T>,
    /// Gradients of the products of a reading head.
    products: [T; CHUNK],
    /// Queries, each weighed with the gradient of its product, of all reading heads.
    queries: Buffer<T>,
    /// That of u, from one chunk.
    pub gradient: Buffer<T>,
}

impl<T: Number> Bonus<T> {
    pub fn new(context: &Context<'_, T>) -> Self {
        let d = context.padded().0;
        let zeros = Buffer::zeros;
        let rows = context.rows() * d;
        Self { keys: zeros(rows), products: [T::ZERO; CHUNK], queries: zeros(rows), gradient: zeros(d) }
    }

    /// The keys of a chunk.
    pub fn load(&mut self, context: &Context<'_, T>, at: StateHead, keys: &[T]) {
        let to = &mut self.keys[..keys.len()];
        to.copy_from_slice(keys);
        for row in to.chunks_exact_mut(context.padded().0) {
            context.verbs.multiply_elements(row, context.bonus(at.head));
        }
    }

    /// Puts the products of queries with their own keys on the diagonal.
    pub fn multiply(&mut self, context: &Context<'_, T>, queries: &[T], products: &mut [T]) {
        let (verbs, d) = (context.verbs, context.padded().0);
        let (own, rows) = (&mut self.products, queries.len() / d);
        verbs.row_pair_products(queries, &self.keys, d, &mut own[..rows]);
        for (i, &product) in own[..rows].iter().enumerate() {
            products[i * verbs.padded(CHUNK) + i] = product;
        }
    }

    /// Starts the gradients of a chunk.
    pub fn clear(&mut self) {
        self.queries.fill(T::ZERO);
    }

    /// Adds to the gradients of the queries of a reading head, given those of its products.
    pub fn add_queries(&mut self, context: &Context<'_, T>, queries: &[T], d_queries: &mut [T], d_products: &[T]) {
        let (verbs, d) = (context.verbs, context.padded().0);
        let own = std::array::from_fn::<T, CHUNK, _>(|i| d_products[i]);
        verbs.add_scaled(d_queries, &self.keys, d, &own);
        verbs.add_scaled(&mut self.queries[..queries.len()], queries, d, &own);
    }

    /// Adds to the gradients of keys, and makes that of the bonus, when all reading heads have been added.
    pub fn add_keys(&mut self, context: &Context<'_, T>, at: StateHead, keys: &[T], d_keys: &mut [T]) {
        let (verbs, d) = (context.verbs, context.padded().0);
        self.gradient.fill(T::ZERO);
        let rows = self.queries.chunks_exact(d).zip(keys.chunks_exact(d)).zip(d_keys.chunks_exact_mut(d));
        for ((query, key), d_key) in rows {
            verbs.add_products(&mut self.gradient, query, key);
            verbs.add_products(d_key, query, context.bonus(at.head));
        }
    }
}
