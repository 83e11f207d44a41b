use super::super::{Array, delta_attention, delta_attention_backward};
use super::random;
use crate::delta::DeltaOptions;
use crate::problem::RankOne;

struct Inputs {
    /// q, k, v, then β or a and b, the log-decay, the state.
    arrays: Vec<Array>,
    rank_one: RankOne<()>,
    key_mask: Option<Array>,
    normalize: Option<f64>,
    /// Whether the array behind those of the rank-one part is a bonus.
    bonus: bool,
}

impl Inputs {
    fn rank_one(&self) -> RankOne<&Array> {
        match self.rank_one {
            RankOne::None => RankOne::None,
            RankOne::Rule { .. } => RankOne::Rule { beta: &self.arrays[3] },
            RankOne::Free { .. } => RankOne::Free { a: &self.arrays[3], b: &self.arrays[4] },
        }
    }

    fn options(&self) -> DeltaOptions<Array> {
        let log_decay = Some(self.arrays[self.arrays.len() - 2].clone());
        let bonus = self.bonus.then(|| self.arrays[3].clone());
        DeltaOptions {
            log_decay,
            bonus,
            key_mask: self.key_mask.clone(),
            normalize: self.normalize,
            ..Default::default()
        }
    }

    fn operands(&self) -> [&Array; 3] {
        [&self.arrays[0], &self.arrays[1], &self.arrays[2]]
    }

    fn loss(&self, d_out: &Array, d_state: &Array) -> f64 {
        let (out, state) = delta_attention(self.operands(), self.rank_one(), &self.options(), self.arrays.last());
        let dot = |x: &Array, y: &Array| x.data.iter().zip(&y.data).map(|(x, y)| x * y).sum::<f64>();
        dot(&out, d_out) + dot(&state, d_state)
    }
}

/// Every gradient is the central difference of the loss, with shared heads, a mask, norms and decays of every form.
#[test]
fn gradients_are_differences() {
    let (b, hq, hk, hv, n, d, e) = (2, 2, 1, 2, 5, 3, 2);
    let decays = [[1, 1, 1, hv], [1, b, hv, n], [b, hv, n, d]];
    let forms = [RankOne::None, RankOne::Rule { beta: () }, RankOne::Free { a: (), b: () }].map(|form| (form, false));
    for (rank_one, bonus) in forms.into_iter().chain([(RankOne::None, true)]) {
        for (index, decay) in decays.into_iter().enumerate() {
            let rows = [b, hk, n, d];
            let mut arrays = vec![random([b, hq, n, d], 1), random(rows, 2), random([b, hv, n, e], 3)];
            match rank_one {
                RankOne::None if bonus => arrays.push(random([1, 1, hv, d], 4)),
                RankOne::None => {}
                RankOne::Rule { .. } => arrays.push(random([1, b, hv, n], 4)),
                RankOne::Free { .. } => arrays.extend([random(rows, 4), random(rows, 5)]),
            }
            let mut log_decay = random(decay, 6);
            log_decay.data.iter_mut().for_each(|g| *g = -g.abs());
            arrays.extend([log_decay, random([b, hv, d, e], 7)]);
            let mask = Array::from_fn([1, 1, b, n], |[_, _, b, t]| f64::from(u8::from(t != 1 + b)));
            let normalize = (index != 1).then_some(0.1);
            let mut inputs = Inputs { arrays, rank_one, key_mask: Some(mask), normalize, bonus };
            let (d_out, d_state) = (random([b, hv, n, e], 8), random([b, hv, d, e], 9));
            let state = inputs.arrays.last().cloned();
            let gradients = delta_attention_backward(
                inputs.operands(),
                inputs.rank_one(),
                &inputs.options(),
                state.as_ref(),
                &d_out,
                Some(&d_state),
            );
            let mut expected = vec![gradients.q, gradients.k, gradients.v];
            match gradients.rank_one {
                RankOne::None => {}
                RankOne::Rule { beta } => expected.push(beta),
                RankOne::Free { a, b } => expected.extend([a, b]),
            }
            expected.extend(gradients.bonus);
            expected.extend([gradients.log_decay.unwrap(), gradients.state]);
            assert_eq!(expected.len(), inputs.arrays.len());
            for (which, gradient) in expected.iter().enumerate() {
                for at in 0..gradient.data.len() {
                    let mut moved = |by: f64| {
                        let before = inputs.arrays[which].data[at];
                        inputs.arrays[which].data[at] = before + by;
                        let loss = inputs.loss(&d_out, &d_state);
                        inputs.arrays[which].data[at] = before;
                        loss
                    };
                    let step = 1e-5;
                    let difference = (moved(step) - moved(-step)) / (2.0 * step);
                    let got = gradient.data[at];
                    let near = (got - difference).abs() <= 1e-8 * (1.0 + difference.abs());
                    assert!(near, "{rank_one:?}, decay {index}, input {which}[{at}]: {got} for {difference}");
                }
            }
        }
    }
}

/// A log-decay of a cut leaves nothing of what came before.
#[test]
fn a_cut_starts_anew() {
    let (q, k, v) = (random([1, 1, 6, 3], 1), random([1, 1, 6, 3], 2), random([1, 1, 6, 2], 3));
    let beta = Array::filled([1, 1, 1, 6], 0.7);
    let mut log_decay = Array::filled([1, 1, 1, 6], -0.1);
    log_decay.data[4] = f64::NEG_INFINITY;
    let options = DeltaOptions { log_decay: Some(log_decay.clone()), ..Default::default() };
    let whole = delta_attention([&q, &k, &v], RankOne::Rule { beta: &beta }, &options, None).0;
    let tail = |x: &Array| Array::from_fn([1, 1, 2, x.shape[3]], |[_, _, i, d]| x.row(0, 0, 4 + i)[d]);
    let of_tokens = |x: &Array| Array { data: x.data[4..].to_vec(), shape: [1, 1, 1, 2] };
    let options = DeltaOptions { log_decay: Some(of_tokens(&log_decay)), ..Default::default() };
    let (tail_q, tail_k, tail_v) = (tail(&q), tail(&k), tail(&v));
    let beta = of_tokens(&beta);
    let alone = delta_attention([&tail_q, &tail_k, &tail_v], RankOne::Rule { beta: &beta }, &options, None).0;
    assert_eq!(tail(&whole), alone);
}
