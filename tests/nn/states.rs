//! RWKV-7, S4D and LRU: what is theirs alone.

use attn_kernels::nn::{
    Attention, AttentionConfig, LanguageModel, LanguageModelConfig, Mechanism, foreign_weights, seeded_weights,
};
use attn_kernels::s4d_lin;
use candle_core::{DType, Device, Module, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};

use super::{WIDTH, assert_close, assert_refused, distance, enlarge, is_trained, layer, random};

fn built(json: &str) -> Result<Attention> {
    let config: AttentionConfig = serde_json::from_str(json).map_err(candle_core::Error::wrap)?;
    Attention::new(&config, seeded_weights(&VarMap::new(), 0, DType::F32, &Device::Cpu))
}

#[test]
fn configurations() -> Result<()> {
    let with = |heads: usize, mechanism: &str, rest: &str| {
        built(&format!(r#"{{"width":8,"heads":{heads},"mechanism":{{{mechanism}}}{rest}}}"#))
    };
    for (name, heads) in [("rwkv7", 2), ("s4d", 1), ("lru", 1)] {
        let kind = format!(r#""kind":"{name}""#);
        with(heads, &kind, "")?;
        assert_refused(with(heads, &kind, r#","causal":false"#), &["`causal` is false", name]);
        assert_refused(with(heads, &kind, r#","rotary":10000.0"#), &["`rotary` is 10000", "no positions"]);
        assert_refused(with(heads, &format!(r#"{kind},"window":3"#), ""), &["window"]);
        if heads == 1 {
            assert_refused(with(2, &kind, ""), &["`heads` is 2", "1 for", name]);
            assert_refused(with(1, &kind, r#","head_width":4"#), &["`head_width` is 4", "`width`"]);
            assert_refused(with(1, &format!(r#"{kind},"states":0"#), ""), &["`states` is 0"]);
        }
    }
    let rwkv7 = |field: &str| with(2, &format!(r#""kind":"rwkv7",{field}"#), "");
    assert_refused(rwkv7(r#""epsilon":0.0"#), &["`epsilon` is 0"]);
    assert_refused(rwkv7(r#""place":[3,3]"#), &["`place` is Some([3, 3])"]);
    assert_refused(rwkv7(r#""ranks":[4,4,0,4]"#), &["`ranks` is 0"]);
    assert_refused(with(2, r#""kind":"rwkv7""#, r#","key_heads":1"#), &["`key_heads` is 1", "2, as `heads`"]);
    let lru = |field: &str| with(1, &format!(r#""kind":"lru",{field}"#), "");
    for radii in ["[0.5,0.5]", "[-0.1,0.5]", "[0.5,1.1]"] {
        assert_refused(lru(&format!(r#""radii":{radii}"#)), &["`radii` is", "0 ≤ inner < outer ≤ 1"]);
    }
    for phase in ["0.0", "6.3", "-1.0"] {
        assert_refused(lru(&format!(r#""phase":{phase}"#)), &["`phase` is", "2π"]);
    }
    Ok(())
}

/// The names and shapes of the published programs.
#[test]
fn weights_have_their_published_names() -> Result<()> {
    let names = |mechanism: Mechanism, heads: usize| -> Result<Vec<String>> {
        let variables = VarMap::new();
        let weights = seeded_weights(&variables, 0, DType::F32, &Device::Cpu);
        Attention::new(&AttentionConfig::new(16, heads, mechanism), weights)?;
        let data = variables.data().lock().unwrap();
        let weights = data.iter().filter(|(name, _)| !name.contains("mechanism."));
        let mut names: Vec<_> = weights.map(|(name, weight)| format!("{name} {:?}", weight.dims())).collect();
        names.sort();
        Ok(names)
    };
    let first = [
        "a_lora.lora.0.weight [32, 16]",
        "a_lora.lora.2.bias [16]",
        "a_lora.lora.2.weight [16, 32]",
        "g_lora.lora.0.weight [32, 16]",
        "g_lora.lora.2.weight [16, 32]",
        "g_norm.bias [16]",
        "g_norm.weight [16]",
        "k_a [16]",
        "k_k [16]",
        "k_proj.weight [16, 16]",
        "o_proj.weight [16, 16]",
        "r_k [4, 4]",
        "r_proj.weight [16, 16]",
        "v_proj.weight [16, 16]",
        "w_lora.lora.0.weight [32, 16]",
        "w_lora.lora.2.bias [16]",
        "w_lora.lora.2.weight [16, 32]",
        "x_a [1, 1, 16]",
        "x_g [1, 1, 16]",
        "x_k [1, 1, 16]",
        "x_r [1, 1, 16]",
        "x_v [1, 1, 16]",
        "x_w [1, 1, 16]",
    ];
    assert_eq!(names(Mechanism::named("rwkv7")?, 4)?, first);
    let residual = ["v_lora.lora.0.weight [3, 16]", "v_lora.lora.2.bias [16]", "v_lora.lora.2.weight [16, 3]"];
    let behind = Mechanism::Rwkv7 { ranks: Some([32, 32, 3, 32]), place: Some([1, 4]), epsilon: 64e-5 };
    let mut expected: Vec<_> = first.into_iter().chain(residual).collect();
    expected.sort();
    assert_eq!(names(behind, 4)?, expected);
    let s4d = [
        "D [16]",
        "kernel.A_imag [16, 32]",
        "kernel.C [16, 32, 2]",
        "kernel.log_A_real [16, 32]",
        "kernel.log_dt [16]",
        "output_linear.0.weight [32, 16]",
    ];
    assert_eq!(names(Mechanism::named("s4d")?, 1)?, s4d);
    let lru = [
        "B_im [16, 16]",
        "B_re [16, 16]",
        "C_im [16, 16]",
        "C_re [16, 16]",
        "D [16]",
        "gamma_log [16]",
        "nu_log [16]",
        "out1.weight [16, 16]",
        "out2.weight [16, 16]",
        "theta_log [16]",
    ];
    assert_eq!(names(Mechanism::named("lru")?, 1)?, lru);
    Ok(())
}

/// The widths between factors that RWKV-LM has for models of width 768, 1024 and 2048.
#[test]
fn low_ranks_are_those_of_rwkv() -> Result<()> {
    for (width, [w, v, g]) in [(768, [64, 32, 128]), (1024, [64, 64, 160]), (2048, [128, 64, 224])] {
        let config = AttentionConfig::new(width, width / 64, Mechanism::named("rwkv7")?);
        let variables = VarMap::new();
        let place = Mechanism::Rwkv7 { ranks: None, place: Some([1, 2]), epsilon: 64e-5 };
        let config = AttentionConfig { mechanism: place, ..config };
        Attention::new(&config, VarBuilder::from_varmap(&variables, DType::BF16, &Device::Cpu))?;
        let data = variables.data().lock().unwrap();
        let ranks = ["w", "a", "v", "g"].map(|name| data[&format!("{name}_lora.lora.0.weight")].dims()[0]);
        assert_eq!(ranks, [w, w, v, g], "width {width}");
    }
    Ok(())
}

/// Numbers of a weight.
fn numbers(variables: &VarMap, name: &str) -> Vec<f64> {
    let data = variables.data().lock().unwrap();
    data[name].flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1().unwrap()
}

fn fresh(mechanism: Mechanism, width: usize, heads: usize) -> Result<VarMap> {
    let variables = VarMap::new();
    let weights = seeded_weights(&variables, 5, DType::F64, &Device::Cpu);
    Attention::new(&AttentionConfig::new(width, heads, mechanism), weights)?;
    Ok(variables)
}

/// How fresh weights are spread.
#[test]
fn beginnings() -> Result<()> {
    let variables = fresh(Mechanism::S4d { states: 7 }, 300, 1)?;
    let [re, im] = ["kernel.log_A_real", "kernel.A_imag"].map(|name| numbers(&variables, name));
    for (at, (re, im)) in re.into_iter().zip(im).enumerate() {
        assert_eq!([-re.exp(), im], s4d_lin(7)[at % 7]);
    }
    let steps = numbers(&variables, "kernel.log_dt");
    assert!(steps.iter().all(|step| (0.001..0.1).contains(&step.exp())), "{steps:?}");

    let mechanism = Mechanism::Lru { states: Some(4000), radii: [0.6, 0.9], phase: 2.0 };
    let variables = fresh(mechanism, 8, 1)?;
    let [nu, theta, gamma] = ["nu_log", "theta_log", "gamma_log"].map(|name| numbers(&variables, name));
    let squares: Vec<f64> = nu.iter().map(|nu| (-2.0 * nu.exp()).exp()).collect();
    assert!(squares.iter().all(|square| (0.36..0.81).contains(square)));
    let mean = |numbers: &mut dyn Iterator<Item = f64>| numbers.sum::<f64>() / 4000.0;
    // Even in |λ|², not in |λ|.
    assert!((mean(&mut squares.iter().copied()) - 0.585).abs() < 0.01);
    assert!((mean(&mut theta.iter().map(|theta| theta.exp())) - 1.0).abs() < 0.05);
    assert!(theta.iter().all(|theta| theta.exp() < 2.0));
    for (gamma, square) in gamma.iter().zip(&squares) {
        assert!((gamma.exp() - (1.0 - square).sqrt()).abs() < 1e-12);
    }

    // Places 0 and 2 of 3: channels of heads of 4.
    for (layer, shares, w) in [(0, 0.5f64.powf(0.9), -5.5 - 2.5), (2, 0.5f64.powf(0.3), -5.5 - 2.5)] {
        let mechanism = Mechanism::Rwkv7 { ranks: None, place: Some([layer, 3]), epsilon: 64e-5 };
        let variables = fresh(mechanism, 8, 2)?;
        assert!((numbers(&variables, "x_w")[4] - (1.0 - shares)).abs() < 1e-12);
        assert_eq!(numbers(&variables, "x_w")[0], 1.0);
        let bias = numbers(&variables, "w_lora.lora.2.bias");
        assert!((bias[0] - w).abs() < 1e-12 && (bias[7] - (0.5 + 2.5)).abs() < 1e-12, "{bias:?}");
        let scale = ((layer + 1) as f64 / 3.0).powf(0.7);
        assert!(numbers(&variables, "g_norm.weight").iter().all(|weight| (weight - scale).abs() < 1e-12));
        assert_eq!(numbers(&variables, "k_a")[3], 1.02);
        assert_eq!(numbers(&variables, "r_k")[3], -0.04);
    }
    Ok(())
}

/// Weights that are there are not begun anew.
#[test]
fn given_weights_stay() -> Result<()> {
    let x = random("x", &[1, 9, WIDTH])?;
    for config in
        super::layers().into_iter().filter(|config| matches!(config.mechanism.name(), "rwkv7" | "s4d" | "lru"))
    {
        let (variables, layer) = layer(&config)?;
        for variable in variables.all_vars() {
            variable.set(&(variable.as_tensor() * 0.9)?)?;
        }
        let again = Attention::new(&config, VarBuilder::from_varmap(&variables, DType::F64, &Device::Cpu))?;
        assert_eq!(distance(&again.forward(&x)?, &layer.forward(&x)?)?, 0.0, "{config:?}");
        let data = variables.data().lock().unwrap();
        let tensors = data.iter().filter(|(name, _)| is_trained(name));
        let tensors = tensors.map(|(name, variable)| (name.clone(), variable.as_tensor().clone())).collect();
        let foreign = foreign_weights(VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu));
        assert_eq!(distance(&Attention::new(&config, foreign)?.forward(&x)?, &layer.forward(&x)?)?, 0.0);
    }
    Ok(())
}

/// A model of RWKV-7 whose values are mixed by hand.
#[test]
fn first_values_reach_later_layers() -> Result<()> {
    let config = LanguageModelConfig::named("rwkv7", 11, WIDTH, 3, 2)?;
    let places: Vec<_> = (0..3)
        .map(|layer| match config.attention(layer).mechanism {
            Mechanism::Rwkv7 { place, .. } => place,
            _ => None,
        })
        .collect();
    assert_eq!(places, [Some([0, 3]), Some([1, 3]), Some([2, 3])]);
    let variables = VarMap::new();
    let model = LanguageModel::new(&config, seeded_weights(&variables, 0, DType::F64, &Device::Cpu))?;
    enlarge(&variables)?;
    let tokens = Tensor::new(&[[1u32, 5, 2, 6, 3, 10, 4]], &Device::Cpu)?;
    let whole = model.forward(&tokens)?;

    // A share of 1 makes them those of the first layer, of 0 the layer's own.
    let set = |name: &str, value: f64| -> Result<()> {
        let data = variables.data().lock().unwrap();
        data[name].set(&Tensor::full(value, data[name].shape(), &Device::Cpu)?)
    };
    let (bias, up) = ("layers.2.self_attn.v_lora.lora.2.bias", "layers.2.self_attn.v_lora.lora.2.weight");
    set(up, 0.0)?;
    set(bias, -1000.0)?;
    let own = model.forward(&tokens)?;
    set(bias, 1000.0)?;
    let of_first = model.forward(&tokens)?;
    assert!(distance(&own, &whole)? > 1e-4 && distance(&own, &of_first)? > 1e-4);
    set("layers.2.self_attn.v_proj.weight", 0.0)?;
    assert_close(&model.forward(&tokens)?, &of_first, 1e-12, "its own values are left out")?;
    // Not those of the middle layer, which has some still.
    set("layers.0.self_attn.v_proj.weight", 0.0)?;
    let nothing = model.forward(&tokens)?;
    set("layers.2.self_attn.r_proj.weight", 0.0)?;
    assert!(distance(&model.forward(&tokens)?, &nothing)? < 1e-12, "values of nothing are read");
    Ok(())
}

/// Where there are no first values a layer says so.
#[test]
fn first_values_are_asked_for() -> Result<()> {
    let mechanism = |place| Mechanism::Rwkv7 { ranks: None, place: Some(place), epsilon: 64e-5 };
    let config = AttentionConfig::new(WIDTH, 2, mechanism([1, 3]));
    let (_, layer) = layer(&config)?;
    let x = random("x", &[1, 5, WIDTH])?;
    let words = ["Attention::forward", "`place`", "a model, whose first rwkv7 layer"];
    assert_refused(layer.forward(&x), &words);
    let mut cache = layer.cache()?;
    assert_refused(layer.forward_cached(&x, &mut cache), &words);
    assert!(cache.is_empty());
    let named = LanguageModelConfig::named("rwkv7", 11, WIDTH, 3, 2)?;
    let weights = || seeded_weights(&VarMap::new(), 0, DType::F64, &Device::Cpu);
    let model = LanguageModel::new(&named, weights())?;
    assert_eq!(model.blocks()[0].forward(&x)?.dims(), [1, 5, WIDTH]);
    assert_refused(model.blocks()[1].forward(&x), &words);

    let with = |attention: AttentionConfig, pattern: Vec<AttentionConfig>| {
        let config = LanguageModelConfig { attention, pattern, ..named.clone() };
        LanguageModel::new(&config, weights())
    };
    assert_refused(with(config.clone(), Vec::new()), &["`place` is [1, 3]", "number 0 before"]);
    let any = AttentionConfig::new(WIDTH, 2, Mechanism::named("rwkv7")?);
    let wide = AttentionConfig { head_width: Some(8), ..any.clone() };
    assert_refused(with(any.clone(), vec![wide]), &["`heads` is of width 16", "width 8 together"]);
    // The first of its kind need not be the first block; and all may keep to their own.
    let softmax = AttentionConfig::new(WIDTH, 2, Mechanism::default());
    let hybrid = with(softmax, vec![any.clone(), any])?;
    let tokens = Tensor::new(&[[1u32, 2, 3, 4]], &Device::Cpu)?;
    assert_eq!(hybrid.forward(&tokens)?.dims(), [1, 4, 11]);
    let apart = with(AttentionConfig::new(WIDTH, 2, mechanism([0, 3])), Vec::new())?;
    assert_eq!(apart.forward(&tokens)?.dims(), [1, 4, 11]);
    Ok(())
}

/// Long rows of S4D, more than a chunk, in one call and token by token, with gradients of the plain recurrence.
#[test]
fn chunks_of_s4d_are_the_recurrence() -> Result<()> {
    let config = AttentionConfig::new(WIDTH, 1, Mechanism::S4d { states: 3 });
    let (variables, layer) = layer(&config)?;
    let x = Var::from_tensor(&random("x", &[2, 150, WIDTH])?)?;
    let y = layer.forward(&x)?;
    let mut cache = layer.cache()?;
    let mut start = 0;
    let cuts = [1, 1, 64, 3, 70, 11];
    for count in cuts {
        let piece = layer.forward_cached(&x.narrow(1, start, count)?, &mut cache)?;
        assert_close(&piece, &y.narrow(1, start, count)?, 1e-11, &format!("{count} from {start}"))?;
        start += count;
    }

    let data = variables.data().lock().unwrap();
    let weight = |name: &str| data[name].as_tensor().clone();
    let (dt, c) = (weight("kernel.log_dt").exp()?.unsqueeze(1)?, weight("kernel.C"));
    let a = [weight("kernel.log_A_real").exp()?.neg()?, weight("kernel.A_imag")];
    let times = |x: &[Tensor; 2], y: &[Tensor; 2]| -> Result<[Tensor; 2]> {
        let part = |pairs: [(&Tensor, &Tensor); 2], sign: f64| {
            pairs[0].0.broadcast_mul(pairs[0].1)? + (pairs[1].0.broadcast_mul(pairs[1].1)? * sign)?
        };
        Ok([part([(&x[0], &y[0]), (&x[1], &y[1])], -1.0)?, part([(&x[0], &y[1]), (&x[1], &y[0])], 1.0)?])
    };
    let z = [a[0].broadcast_mul(&dt)?, a[1].broadcast_mul(&dt)?];
    let turn = [(z[0].exp()? * z[1].cos()?)?, (z[0].exp()? * z[1].sin()?)?];
    let square = (a[0].sqr()? + a[1].sqr()?)?;
    let b = times(&[(&turn[0] - 1.0)?, turn[1].clone()], &[(&a[0] / &square)?, (&a[1] / &square)?.neg()?])?;
    let c = [c.narrow(2, 0, 1)?.squeeze(2)?, c.narrow(2, 1, 1)?.squeeze(2)?];
    let mut h = [
        Tensor::zeros((2, WIDTH, 3), DType::F64, &Device::Cpu)?,
        Tensor::zeros((2, WIDTH, 3), DType::F64, &Device::Cpu)?,
    ];
    let mut rows = Vec::new();
    for step in 0..150 {
        let u = x.narrow(1, step, 1)?.squeeze(1)?;
        let turned = times(&turn, &h)?;
        let added = [0, 1].map(|part| u.unsqueeze(2)?.broadcast_mul(&b[part]));
        let [re, im] = added;
        h = [(&turned[0] + re?)?, (&turned[1] + im?)?];
        let read = (times(&c, &h)?[0].sum(2)? * 2.0)?;
        rows.push((read + u.broadcast_mul(&weight("D"))?)?);
    }
    let rows = attn_kernels::nn::Activation::Gelu.forward(&Tensor::stack(&rows, 1)?)?;
    let both = rows.broadcast_matmul(&weight("output_linear.0.weight").t()?)?;
    let gate = attn_kernels::nn::Activation::Sigmoid.forward(&both.narrow(2, WIDTH, WIDTH)?)?;
    let plain = (both.narrow(2, 0, WIDTH)? * gate)?;
    assert_close(&y, &plain, 1e-11, "plain")?;
    let loss = |y: &Tensor| (y * random("loss", y.dims())?)?.sum_all()?.backward();
    let (ours, theirs) = (loss(&y)?, loss(&plain)?);
    let all = data.iter().filter(|(name, _)| is_trained(name)).map(|(name, variable)| (name.as_str(), variable));
    for (name, variable) in all.chain([("x", &x)]) {
        let (Some(ours), Some(theirs)) = (ours.get(variable), theirs.get(variable)) else { panic!("{name}") };
        let scale = 1.0 + theirs.abs()?.max_all()?.to_scalar::<f64>()?;
        assert_close(ours, theirs, 1e-10 * scale, name)?;
    }
    Ok(())
}

/// In half precision rates, steps and skips keep the dtype of sums.
#[test]
fn rates_are_in_the_dtype_of_sums() -> Result<()> {
    for (name, heads) in [("rwkv7", 2), ("s4d", 1), ("lru", 1)] {
        let variables = VarMap::new();
        let config = AttentionConfig::new(16, heads, Mechanism::named(name)?);
        let layer = Attention::new(&config, seeded_weights(&variables, 0, DType::BF16, &Device::Cpu))?;
        enlarge(&variables)?;
        for (name, variable) in variables.data().lock().unwrap().iter().filter(|(name, _)| is_trained(name)) {
            let is_rate =
                ["D", "nu_log", "theta_log", "gamma_log"].contains(&name.as_str()) || name.starts_with("kernel.");
            assert_eq!(variable.dtype(), if is_rate { DType::F32 } else { DType::BF16 }, "{name}");
        }
        let x = random("x", &[1, 70, 16])?;
        let out = layer.forward(&x.to_dtype(DType::BF16)?)?;
        assert_eq!(out.dtype(), DType::BF16);
        // As good as numbers of eight bits are.
        let data = variables.data().lock().unwrap();
        let exact = data.iter().map(|(name, variable)| Ok((name.clone(), variable.as_tensor().to_dtype(DType::F64)?)));
        let exact = VarBuilder::from_tensors(exact.collect::<Result<_>>()?, DType::F64, &Device::Cpu);
        let expected = Attention::new(&config, exact)?.forward(&x)?;
        let largest = expected.abs()?.max_all()?.to_scalar::<f64>()?;
        assert_close(&out.to_dtype(DType::F64)?, &expected, 0.05 * largest, name)?;
    }
    Ok(())
}
