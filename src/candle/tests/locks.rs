//! Calls whose tensors share storages, while other threads write to these.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::candle::{
    LinearState, causal_convolution, diagonal_scan, linear_attention, linear_attention_with_state, performer_attention,
    softmax_attention, softmax_attention_with_lse,
};
use crate::{ConvolutionOptions, LinearOptions, PerformerOptions, ScanOptions, SoftmaxOptions};

/// Fails if the calls are not over in time, while threads set the variables again and again.
fn finishes(name: &'static str, variables: &[&Var], call: impl Fn() -> Result<()> + Send + 'static) {
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let writers: Vec<_> = variables
        .iter()
        .map(|&variable| {
            let (variable, stop) = (variable.clone(), stop.clone());
            let numbers = variable.as_detached_tensor().copy().expect("numbers");
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    variable.set(&numbers).expect("set");
                }
            })
        })
        .collect();
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send((0..50).try_for_each(|_| call())));
    // Threads that hang are left behind.
    let result = receiver.recv_timeout(Duration::from_secs(60)).unwrap_or_else(|_| panic!("{name} hangs"));
    stop.store(true, Ordering::Relaxed);
    writers.into_iter().for_each(|writer| writer.join().expect("a writer"));
    result.expect(name);
}

#[test]
fn one_tensor_three_times() -> Result<()> {
    let x = variable(&[1, 2, 16, 8], 1)?;
    let y = x.clone();
    finishes("softmax, forward and backward", &[&x], move || {
        let (out, lse) = softmax_attention_with_lse(&y, &y, &y, &SoftmaxOptions::default())?;
        (loss(&out)? + loss(&lse)?)?.backward().map(|_| ())
    });
    let y = x.clone();
    finishes("linear, forward and backward", &[&x], move || {
        loss(&linear_attention(&y, &y, &y, &LinearOptions::default())?)?.backward().map(|_| ())
    });
    Ok(())
}

/// Bias, log-decay, ω and state are views of the storage of q, k and v.
#[test]
fn views_of_one_tensor() -> Result<()> {
    let x = variable(&[1, 2, 16, 33], 2)?;
    let y = x.clone();
    finishes("softmax", &[&x], move || {
        let (q, bias) = (y.narrow(3, 0, 8)?, y.narrow(2, 0, 1)?.squeeze(2)?.squeeze(0)?);
        let (k, v) = (y.narrow(3, 8, 8)?, y.narrow(3, 4, 8)?);
        let options = SoftmaxOptions { bias: Some(bias), ..Default::default() };
        loss(&softmax_attention(&q, &k, &v, &options)?)?.backward().map(|_| ())
    });
    let y = x.clone();
    finishes("linear", &[&x], move || {
        let (x, numbers) = (y.as_tensor().narrow(3, 0, 8)?, y.as_detached_tensor().narrow(3, 8, 8)?);
        let state = LinearState::new(numbers.narrow(2, 0, 8)?, numbers.narrow(2, 8, 1)?.squeeze(2)?, None, 0);
        let options = LinearOptions { causal: true, ..Default::default() };
        linear_attention_with_state(&x, &x, &x, &options, Some(&state)).map(|_| ())
    });
    let y = x.clone();
    finishes("performer", &[&x], move || {
        let numbers = y.as_detached_tensor();
        let omega = numbers.narrow(1, 0, 1)?.squeeze(0)?.squeeze(0)?;
        performer_attention(&numbers, &numbers, &numbers, &omega, &PerformerOptions::default()).map(|_| ())
    });
    let x = variable(&[2, 16, 8], 5)?;
    let y = x.clone();
    finishes("convolution, forward and backward", &[&x], move || {
        let (rows, weight) = (y.narrow(0, 0, 1)?, y.narrow(0, 1, 1)?.reshape((8, 16))?);
        loss(&causal_convolution(&rows, &weight, None, &ConvolutionOptions::default())?)?.backward().map(|_| ())
    });
    let y = x.clone();
    finishes("diagonal scan, forward and backward", &[&x], move || {
        loss(&diagonal_scan(&y.narrow(0, 0, 1)?, &y, &ScanOptions::default())?)?.backward().map(|_| ())
    });
    Ok(())
}

/// Two threads lock two storages in opposite order.
#[test]
fn opposite_orders() -> Result<()> {
    let (x, y) = (variable(&[1, 1, 16, 8], 3)?, variable(&[1, 1, 16, 8], 4)?);
    let pair = (x.clone(), y.clone());
    finishes("softmax", &[&x, &y], move || {
        let call = |x: &Var, y: &Var| softmax_attention(x, y, x, &SoftmaxOptions::default()).map(|_| ());
        std::thread::scope(|scope| {
            let other = scope.spawn(|| (0..4).try_for_each(|_| call(&pair.1, &pair.0)));
            (0..4).try_for_each(|_| call(&pair.0, &pair.1))?;
            other.join().expect("the other thread")
        })
    });
    Ok(())
}
