//! RWKV-7 and the diagonal state-space layers in plain f64 loops.

use attn_kernels::delta::DeltaOptions;
use attn_kernels::nn::Mechanism;
use attn_kernels::problem::RankOne;
use attn_kernels::reference::{self, Array};

use super::by_hand::{ByHand, join, split, times};
use super::by_hand_recurrent::{columns, map, sigmoid};

type Complex = [f64; 2];

fn product(x: Complex, y: Complex) -> Complex {
    [x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]]
}

fn exp(x: Complex) -> Complex {
    [x[0].exp() * x[1].cos(), x[0].exp() * x[1].sin()]
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + libm::erf(x / 2f64.sqrt()))
}

fn plus(mut x: Array, y: &Array) -> Array {
    assert_eq!(x.shape, y.shape);
    x.data.iter_mut().zip(&y.data).for_each(|(x, y)| *x += y);
    x
}

impl ByHand<'_> {
    /// The numbers of a weight.
    fn numbers(&self, name: &str) -> Vec<f64> {
        self.weight(name).unwrap().data
    }

    pub fn rwkv7(&self, x: &Array, key_mask: Array) -> Array {
        let Mechanism::Rwkv7 { epsilon, .. } = self.config.mechanism else { panic!("not rwkv7") };
        let (heads, width) = (self.config.heads, self.config.head_width());
        let mixed = |name: &str| {
            let share = self.numbers(name);
            Array::from_fn(x.shape, |[_, b, i, c]| {
                let (own, before) = (x.row(0, b, i)[c], if i == 0 { 0.0 } else { x.row(0, b, i - 1)[c] });
                own + share[c] * (before - own)
            })
        };
        let low_rank = |x: &Array, name: &str, between: fn(f64) -> f64| {
            self.linear(&map(self.linear(x, &format!("{name}.lora.0")), between), &format!("{name}.lora.2"))
        };
        let scaled = |x: &Array, name: &str| {
            let numbers = self.numbers(name);
            Array::from_fn(x.shape, |[_, b, i, c]| x.row(0, b, i)[c] * numbers[c])
        };
        let [r, k, v] = ["r", "k", "v"].map(|name| self.project(&mixed(&format!("x_{name}")), &format!("{name}_proj")));
        let log_decay = map(low_rank(&mixed("x_w"), "w_lora", f64::tanh), |x| -sigmoid(x) / 1f64.exp().sqrt());
        let rate = map(low_rank(&mixed("x_a"), "a_lora", |x| x), sigmoid);
        let gate = low_rank(&mixed("x_g"), "g_lora", sigmoid);
        let long = scaled(&k, "k_k");
        let kappa = Array::from_fn(k.shape, |[_, b, i, c]| {
            let head = &long.row(0, b, i)[c / width * width..][..width];
            long.row(0, b, i)[c] / head.iter().map(|x| x * x).sum::<f64>().sqrt()
        });
        let k = plus(k.clone(), &scaled(&times(k, &map(rate.clone(), |a| a - 1.0)), "k_a"));
        let written = map(times(rate, &kappa), |x| -x);
        let [q, keys, values, a, b, log_decay] =
            [&r, &k, &v, &written, &kappa, &log_decay].map(|rows| split(rows, heads));
        let options = DeltaOptions {
            log_decay: Some(log_decay),
            scale: Some(1.0),
            key_mask: Some(key_mask),
            ..Default::default()
        };
        let free = RankOne::Free { a: &a, b: &b };
        let out = join(&reference::delta_attention([&q, &keys, &values], free, &options, None).0);
        let (weight, bias, own) = (self.numbers("g_norm.weight"), self.numbers("g_norm.bias"), self.numbers("r_k"));
        let count = width as f64;
        let normed = Array::from_fn(out.shape, |[_, b, i, c]| {
            let head = c / width * width..c / width * width + width;
            let row = &out.row(0, b, i)[head.clone()];
            let mean = row.iter().sum::<f64>() / count;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / count;
            let normed = (out.row(0, b, i)[c] - mean) / (variance + epsilon).sqrt() * weight[c] + bias[c];
            let bonus: f64 = head.map(|d| r.row(0, b, i)[d] * own[d] * k.row(0, b, i)[d]).sum();
            normed + bonus * v.row(0, b, i)[c]
        });
        self.project(&times(normed, &gate), "o_proj")
    }

    /// By the kernel, over all tokens.
    pub fn s4d(&self, x: &Array) -> Array {
        let [log_dt, re, im, c, skip] =
            ["kernel.log_dt", "kernel.log_A_real", "kernel.A_imag", "kernel.C", "D"].map(|name| self.numbers(name));
        let states = im.len() / log_dt.len();
        let kernel = |channel: usize, steps: usize| -> f64 {
            let numbers = channel * states..(channel + 1) * states;
            let term = |at: usize| {
                let (a, dt) = ([-re[at].exp(), im[at]], log_dt[channel].exp());
                let grown = exp([a[0] * dt, a[1] * dt]);
                let square = a[0] * a[0] + a[1] * a[1];
                let b = product([grown[0] - 1.0, grown[1]], [a[0] / square, -a[1] / square]);
                let power = exp([a[0] * dt * steps as f64, a[1] * dt * steps as f64]);
                2.0 * product(product([c[2 * at], c[2 * at + 1]], b), power)[0]
            };
            numbers.map(term).sum()
        };
        let y = Array::from_fn(x.shape, |[_, b, i, channel]| {
            let past: f64 = (0..=i).map(|j| kernel(channel, i - j) * x.row(0, b, j)[channel]).sum();
            gelu(past + skip[channel] * x.row(0, b, i)[channel])
        });
        let both = self.project(&y, "output_linear.0");
        let width = x.shape[3];
        times(columns(&both, 0, width), &map(columns(&both, width, width), sigmoid))
    }

    pub fn lru(&self, x: &Array) -> Array {
        let [nu, theta, gamma, b_re, b_im, c_re, c_im, skip] =
            ["nu_log", "theta_log", "gamma_log", "B_re", "B_im", "C_re", "C_im", "D"].map(|name| self.numbers(name));
        let ([_, batch, rows, width], states) = (x.shape, nu.len());
        let mut y = Array::zeros(x.shape);
        for b in 0..batch {
            let mut h = vec![[0.0; 2]; states];
            for i in 0..rows {
                let x = x.row(0, b, i);
                for (n, h) in h.iter_mut().enumerate() {
                    let lambda = exp([-nu[n].exp(), theta[n].exp()]);
                    let sum = |b: &[f64]| x.iter().zip(&b[n * width..]).map(|(x, b)| x * b).sum::<f64>();
                    let turned = product(lambda, *h);
                    *h = [turned[0] + gamma[n].exp() * sum(&b_re), turned[1] + gamma[n].exp() * sum(&b_im)];
                }
                for c in 0..width {
                    let term = |(n, h): (usize, &Complex)| product([c_re[c * states + n], c_im[c * states + n]], *h)[0];
                    y.row_mut(0, b, i)[c] = gelu(h.iter().enumerate().map(term).sum::<f64>() + skip[c] * x[c]);
                }
            }
        }
        times(self.project(&y, "out1"), &map(self.project(&y, "out2"), sigmoid))
    }
}
