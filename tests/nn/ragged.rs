//! Sequences of any lengths with a cache each: what one gives does not depend on the others, to the bit.

use attn_kernels::Sequences;
use attn_kernels::nn::{
    Attention, Cache, LanguageModel, LanguageModelConfig, ModelCache, Norm, NormConfig, seeded_weights,
};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarMap;

use super::models::model;
use super::{Scratch, WIDTH, assert_close, assert_refused, distance, enlarge, layer, layers, random};

/// Steps of five sequences: how many rows each reads.
const STEPS: [[u32; 5]; 4] = [[7, 1, 0, 40, 23], [1, 1, 1, 1, 1], [0, 3, 9, 1, 0], [1, 1, 1, 1, 1]];

fn sequence(index: usize) -> Result<Tensor> {
    random(&format!("sequence {index}"), &[1, STEPS.iter().map(|step| step[index] as usize).sum(), WIDTH])
}

/// Rows of every sequence, read in the same steps as all are, but alone.
fn alone(layer: &Attention, dtype: DType) -> Result<Vec<Tensor>> {
    let run = |index: usize| -> Result<Tensor> {
        let (x, mut cache, mut start) = (sequence(index)?.to_dtype(dtype)?, layer.cache()?, 0);
        let mut outs = Vec::new();
        for count in STEPS.map(|step| step[index] as usize).into_iter().filter(|count| *count > 0) {
            outs.push(layer.forward_cached(&x.narrow(1, start, count)?, &mut cache)?);
            start += count;
        }
        Tensor::cat(&outs, 1)
    };
    (0..5).map(run).collect()
}

/// Rows of every sequence, all read together.
fn together(layer: &Attention, caches: &mut [Cache], dtype: DType) -> Result<Vec<Tensor>> {
    let sequences: Vec<_> = (0..5).map(|index| sequence(index)?.to_dtype(dtype)).collect::<Result<_>>()?;
    let (mut starts, mut outs) = ([0; 5], vec![Vec::new(); 5]);
    for step in STEPS {
        let rows = (0..5).map(|index| sequences[index].narrow(1, starts[index], step[index] as usize));
        let x = Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 1)?;
        let out = layer.forward_sequences_cached(&x, &Sequences::of_lengths(step), caches)?;
        let mut start = 0;
        for (index, count) in step.into_iter().enumerate().map(|(index, count)| (index, count as usize)) {
            outs[index].push(out.narrow(1, start, count)?);
            (start, starts[index]) = (start + count, starts[index] + count);
        }
    }
    outs.iter().map(|outs| Tensor::cat(outs, 1)).collect()
}

#[test]
fn rows_of_layers_are_their_own() -> Result<()> {
    for config in layers() {
        let (_, layer) = layer(&config)?;
        let alone = alone(&layer, DType::F64)?;
        for threads in [1, 3] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut caches = vec![layer.cache()?; 5];
            let together = pool.install(|| together(&layer, &mut caches, DType::F64))?;
            for (index, (together, alone)) in together.iter().zip(&alone).enumerate() {
                let what = format!("{config:?}, sequence {index}, {threads} threads");
                assert_eq!(distance(together, alone)?, 0.0, "{what}");
                assert_close(together, &layer.forward(&sequence(index)?)?, 1e-11, &what)?;
                assert_eq!(caches[index].len(), alone.dim(1)?);
            }
        }
    }
    Ok(())
}

/// In narrower numbers; also with gradients.
#[test]
fn in_every_dtype() -> Result<()> {
    for config in layers() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let variables = VarMap::new();
            let layer = Attention::new(&config, seeded_weights(&variables, 3, dtype, &Device::Cpu))?;
            let mut caches = vec![layer.cache()?; 5];
            let together = together(&layer, &mut caches, dtype)?;
            for (index, (together, alone)) in together.iter().zip(&alone(&layer, dtype)?).enumerate() {
                assert_eq!(distance(together, alone)?, 0.0, "{config:?}, sequence {index}, {dtype:?}");
            }
            if dtype == DType::F32 {
                let gradients = together[3].sqr()?.sum_all()?.backward()?;
                let count = variables.all_vars().iter().filter(|variable| gradients.get(variable).is_some()).count();
                assert!(count >= 2, "{config:?}: {count} weights with a gradient");
            }
        }
    }
    Ok(())
}

/// The gradients of products row by row are those of candle's products.
#[test]
fn gradients_reach_the_weights_of_cached_rows() -> Result<()> {
    let x = random("x", &[2, 9, WIDTH])?;
    for config in layers() {
        let (variables, layer) = layer(&config)?;
        let whole = layer.forward(&x)?.sqr()?.sum_all()?.backward()?;
        let cached = layer.forward_cached(&x, &mut layer.cache()?)?.sqr()?.sum_all()?.backward()?;
        for (name, variable) in variables
            .data()
            .lock()
            .unwrap()
            .iter()
            .filter(|(name, _)| name.ends_with("o_proj.weight") || name.ends_with("out_proj.weight"))
        {
            let [whole, cached] = [&whole, &cached].map(|gradients| gradients.get(variable).unwrap());
            let scale = 1.0 + whole.abs()?.max_all()?.to_scalar::<f64>()?;
            assert_close(whole, cached, 1e-10 * scale, &format!("{config:?}: {name}"))?;
        }
    }
    Ok(())
}

/// `[3, 12]`: padding on the left, on the right, and in between.
fn key_mask() -> Result<Tensor> {
    let rows = [
        [0u8, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 0],
    ];
    Tensor::new(&rows, &Device::Cpu)
}

/// Places of the visible rows.
fn places() -> [Vec<u32>; 3] {
    [(5..12).collect(), (0..3).collect(), vec![0, 2, 3, 4, 6, 7, 9, 10]]
}

#[test]
fn padded_prompts_leave_the_caches_of_plain_ones() -> Result<()> {
    let (mask, next) = (key_mask()?, random("next", &[1, 3, WIDTH])?);
    let x = random("padded", &[3, 12, WIDTH])?;
    let keep = mask.unsqueeze(2)?.broadcast_as(x.shape())?;
    let x = keep.where_cond(&x, &Tensor::full(f64::NAN, x.shape(), &Device::Cpu)?)?;
    for config in layers() {
        let (_, layer) = layer(&config)?;
        let mut caches = vec![layer.cache()?; 3];
        let out = layer.forward_masked_cached(&x, &mask, &mut caches)?;
        assert_eq!(out.dims(), x.dims());
        for (index, places) in places().iter().enumerate() {
            let mut plain = layer.cache()?;
            let places = Tensor::new(&places[..], &Device::Cpu)?;
            let expected = layer.forward_cached(&x.narrow(0, index, 1)?.index_select(&places, 1)?, &mut plain)?;
            let out = out.narrow(0, index, 1)?.index_select(&places, 1)?;
            assert_eq!(distance(&out, &expected)?, 0.0, "{config:?} {index}");
            let [a, b] = [&mut caches[index], &mut plain].map(|cache| layer.forward_cached(&next, cache));
            assert_eq!(distance(&a?, &b?)?, 0.0, "{config:?} {index} goes on");
        }
        let nothing = layer.forward_masked_cached(&x, &mask.zeros_like()?, &mut caches)?;
        assert_eq!(nothing.abs()?.max_all()?.to_scalar::<f64>()?, 0.0);
    }
    Ok(())
}

#[test]
fn padded_prompts_of_models() -> Result<()> {
    let mask = key_mask()?;
    let tokens = Tensor::from_vec((0..36u32).map(|i| i * i % 11).collect(), (3, 12), &Device::Cpu)?;
    for name in LanguageModelConfig::NAMES {
        let (_, model) = model(name, DType::F32)?;
        let mut caches = vec![model.cache()?; 3];
        let logits = model.forward_masked_cached(&tokens, &mask, &mut caches)?;
        let after = model.next_logits_each(&[[1u32], [2], [3]], &mut caches)?;
        for (index, places) in places().iter().enumerate() {
            let mut plain = model.cache()?;
            let places = Tensor::new(&places[..], &Device::Cpu)?;
            let expected = model.forward_cached(&tokens.narrow(0, index, 1)?.index_select(&places, 1)?, &mut plain)?;
            let logits = logits.narrow(0, index, 1)?.index_select(&places, 1)?;
            assert_eq!(distance(&logits, &expected)?, 0.0, "{name} {index}");
            let next = model.next_logits(&Tensor::new(&[[1 + index as u32]], &Device::Cpu)?, &mut plain)?;
            assert_eq!(distance(&after.narrow(0, index, 1)?, &next)?, 0.0, "{name} {index} goes on");
        }
        let nothing = model.forward_masked_cached(&tokens, &mask.zeros_like()?, &mut caches)?;
        assert_eq!(nothing.dims(), logits.dims(), "{name}");
    }
    Ok(())
}

/// Models of every width that products are cut at, on every number of threads.
#[test]
fn logits_do_not_depend_on_neighbours_and_threads() -> Result<()> {
    let prompt = |index: usize| (0..1 + index * 97 % 290).map(|i| (i * i + index) as u32 % 300).collect::<Vec<_>>();
    let prompts: Vec<_> = (0..9).map(prompt).collect();
    for (name, dtype) in [
        ("softmax", DType::F32),
        ("retention", DType::F32),
        ("gau", DType::F32),
        ("norm", DType::BF16),
        ("hybrid", DType::F32),
        ("mamba2", DType::F32),
        ("kda", DType::BF16),
        ("gla", DType::F32),
        ("rwkv7", DType::BF16),
        ("s4d", DType::F32),
        ("lru", DType::F32),
    ] {
        let config = LanguageModelConfig::named(name, 300, 96, 2, 4)?;
        let variables = VarMap::new();
        let model = LanguageModel::new(&config, seeded_weights(&variables, 1, dtype, &Device::Cpu))?;
        enlarge(&variables)?;
        let run = |prompts: &[Vec<u32>], threads: usize| -> Result<Vec<Tensor>> {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| {
                let mut caches = vec![model.cache()?; prompts.len()];
                let first = model.next_logits_each(prompts, &mut caches)?;
                let tokens: Vec<[u32; 1]> = (0..prompts.len()).map(|_| [7]).collect();
                let second = model.next_logits_each(&tokens, &mut caches)?;
                (0..prompts.len()).map(|row| Tensor::stack(&[first.get(row)?, second.get(row)?], 0)).collect()
            })
        };
        let all = run(&prompts, 2)?;
        for (index, prompt) in prompts.iter().enumerate() {
            for threads in [1, 4] {
                let alone = run(std::slice::from_ref(prompt), threads)?;
                assert_eq!(distance(&all[index], &alone[0])?, 0.0, "{name} {dtype:?}, {index}, {threads} threads");
            }
        }
        assert!(distance(&all[0], &all[1])? > 1e-3, "{name} ignores its prompt");
    }
    Ok(())
}

/// What can be done with a cache can be done with those of a list.
#[test]
fn caches_of_a_list_are_picked_stored_and_cut() -> Result<()> {
    let prompts = [&[1u32, 2, 3, 4, 5, 6, 7][..], &[8, 9], &[10, 0, 5, 5]];
    for name in ["softmax", "retention", "flash", "gau", "gated_deltanet", "mamba2", "rwkv7", "s4d", "lru"] {
        let (_, model) = model(name, DType::F32)?;
        let mut caches = vec![model.cache()?; 3];
        model.next_logits_each(&prompts, &mut caches)?;
        // Two of the third, the second from a file, the first one token shorter where it can be.
        let file = Scratch::new(&format!("ragged-{name}"));
        caches[1].save(&file.0)?;
        let mut stored = model.cache()?;
        stored.load(&file.0)?;
        let mut picked = vec![caches[2].clone(), stored, caches[2].clone(), caches[0].clone()];
        let is_cut = picked[3].truncate(6).is_ok();
        let tokens = [[1u32, 2], [3, 4], [5, 6], [7, 8]];
        let logits = model.next_logits_each(&tokens, &mut picked)?;
        let read = [prompts[2], prompts[1], prompts[2], &prompts[0][..if is_cut { 6 } else { 7 }]];
        for (row, (prompt, tokens)) in read.into_iter().zip(&tokens).enumerate() {
            let mut cache = model.cache()?;
            // As it was read: a token less is another call.
            let whole = if row == 3 { prompts[0] } else { prompt };
            model.next_logits_each(&[whole], std::slice::from_mut(&mut cache))?;
            cache.truncate(prompt.len())?;
            let alone = model.next_logits(&Tensor::new(&tokens[..], &Device::Cpu)?.unsqueeze(0)?, &mut cache)?;
            assert_eq!(distance(&logits.narrow(0, row, 1)?, &alone)?, 0.0, "{name} {row}");
        }
        assert_eq!(is_cut, matches!(name, "softmax" | "gau" | "flash"), "{name}");
    }
    Ok(())
}

/// A row too large to be squared changes nothing for the others.
#[test]
fn norms_of_rows_are_their_own() -> Result<()> {
    for kind in [attn_kernels::nn::NormKind::Rms, attn_kernels::nn::NormKind::Layer] {
        let weights = seeded_weights(&VarMap::new(), 0, DType::F32, &Device::Cpu);
        let norm = Norm::new(8, &NormConfig { kind, ..Default::default() }, weights)?;
        let row = random("row", &[1, 8])?.to_dtype(DType::F32)?;
        let alone = norm.forward(&row)?;
        for other in [1e30, 1e-30, f64::INFINITY, f64::NAN] {
            let other = (random("other", &[1, 8])?.to_dtype(DType::F32)? * other)?;
            let both = norm.forward(&Tensor::cat(&[&row, &other], 0)?)?;
            assert_eq!(distance(&both.narrow(0, 0, 1)?, &alone)?, 0.0, "{kind:?}");
        }
    }
    Ok(())
}

#[test]
fn joined_caches_go_on_in_one_batch() -> Result<()> {
    let (x, y) = (random("x", &[3, 13, WIDTH])?, random("y", &[4, 4, WIDTH])?);
    for config in layers() {
        let (_, layer) = layer(&config)?;
        for length in [13, 10] {
            let piece = |from: usize, count: usize| -> Result<Cache> {
                let mut cache = layer.cache()?;
                layer.forward_cached(&x.narrow(0, from, count)?.narrow(1, 0, length)?, &mut cache)?;
                Ok(cache)
            };
            let parts = [piece(0, 1)?, piece(1, 2)?, piece(2, 1)?];
            let mut joined = Cache::cat(&parts)?;
            assert_eq!((joined.len(), joined.sequences()), (length, Some(4)));
            let rows = x.index_select(&Tensor::new(&[0u32, 1, 2, 2], &Device::Cpu)?, 0)?.narrow(1, 0, length)?;
            let whole = layer.forward(&Tensor::cat(&[&rows, &y], 1)?)?.narrow(1, length, 4)?;
            assert_close(&layer.forward_cached(&y, &mut joined)?, &whole, 1e-11, &format!("{config:?}"))?;
            assert_refused(Cache::cat(&[&parts[0], &joined]), &["Cache::cat", "`caches`", "as many as in the first"]);
        }
        assert_refused(Cache::cat(&[layer.cache()?]), &["Cache::cat", "empty"]);
    }
    assert_refused(Cache::cat::<Cache>(&[]), &["Cache::cat", "at least one cache"]);
    let models = ["softmax", "linear"].map(|name| model(name, DType::F64).unwrap().1);
    let begun = |model: &LanguageModel| -> Result<ModelCache> {
        let mut cache = model.cache()?;
        model.next_logits_each(&[[1, 2, 3]], std::slice::from_mut(&mut cache)).map(|_| cache)
    };
    let caches = [begun(&models[0])?, begun(&models[1])?];
    assert_refused(ModelCache::cat(&caches), &["Cache::cat", "linear", "softmax"]);
    assert_refused(ModelCache::cat::<ModelCache>(&[]), &["ModelCache::cat", "at least one cache"]);
    assert_eq!(ModelCache::cat(&[&caches[0], &caches[0]])?.sequences(), Some(2));
    Ok(())
}

/// Each refused, and nothing changed by it.
#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let (_, model) = model("softmax", DType::F64)?;
    let mut caches = vec![model.cache()?; 2];
    model.next_logits_each(&[&[1, 2, 3][..], &[4]], &mut caches)?;
    let good = caches.clone();
    let tokens = |count: usize| Tensor::zeros((1, count), DType::U32, &Device::Cpu);
    let packed = |count: usize, sequences: Sequences, caches: &mut [ModelCache]| {
        model.forward_sequences_cached(&tokens(count)?, &sequences, caches)
    };
    let function = "LanguageModel::forward_sequences_cached";
    let each = "LanguageModel::next_logits_each";
    assert_refused(
        packed(3, Sequences::of_lengths([1, 1]), &mut caches),
        &[function, "`sequences`", "end with 2", "3"],
    );
    assert_refused(packed(3, Sequences::new(&[0, 2, 1, 3]), &mut caches), &[function, "fall from 2 to 1"]);
    assert_refused(packed(3, Sequences::new(&[1, 3]), &mut caches), &[function, "begin with 1"]);
    assert_refused(packed(3, Sequences::new(&[]), &mut caches), &[function, "no token offsets"]);
    let two_kinds = Sequences::with_keys(&[0, 1, 3], &[0, 2, 3]);
    assert_refused(packed(3, two_kinds, &mut caches), &[function, "two kinds of offsets"]);
    assert_refused(packed(3, Sequences::of_lengths([3]), &mut caches), &[function, "`caches` is 2", "1, one for each"]);
    let two = Tensor::zeros((2, 3), DType::U32, &Device::Cpu)?;
    let refused = model.forward_sequences_cached(&two, &Sequences::of_lengths([1, 2]), &mut caches);
    assert_refused(refused, &[function, "`tokens`", "[2, 3]", "1 first"]);
    let floats = Tensor::zeros((1, 2), DType::F32, &Device::Cpu)?;
    let refused = model.forward_sequences_cached(&floats, &Sequences::of_lengths([1, 1]), &mut caches);
    assert_refused(refused, &[function, "tokens", "f32", "u32"]);
    assert_refused(model.next_logits_each::<&[u32], _>(&[], &mut caches[..0]), &[each, "no sequence"]);
    assert_refused(model.next_logits_each(&[&[1][..], &[]], &mut caches), &[each, "empty in sequence 1"]);
    assert_refused(model.next_logits_each(&[[1], [11]], &mut caches), &["tokens", "11", "vocabulary of 11"]);
    assert_refused(model.next_logits_each(&[[1]], &mut caches), &[each, "`caches` is 2"]);
    let mask = |count| Tensor::ones((2, count), DType::U8, &Device::Cpu);
    assert_refused(model.forward_masked_cached(&two, &mask(4)?, &mut caches), &["key_mask", "[2, 4]", "[2, 3]"]);
    assert_refused(model.forward_masked_cached(&two, &two, &mut caches), &["key_mask", "u32", "u8"]);
    assert_refused(model.forward_masked_cached(&two, &mask(3)?, &mut caches[..1]), &["`caches` is 1"]);
    // A cache of several sequences, one of another model, and one whose layers do not fit, among good ones.
    let mut several = model.cache()?;
    model.forward_cached(&two, &mut several)?;
    assert_refused(model.next_logits_each(&[[1], [1]], &mut [caches[0].clone(), several]), &["batch of 1", "2, as in"]);
    for name in ["linear", "diag", "transnormer"] {
        let other = super::models::model(name, DType::F64)?.1.cache()?;
        let refused = model.next_logits_each(&[[1], [1]], &mut [caches[0].clone(), other]);
        assert_refused(refused, &[each, "`cache`", "needs one of this layer"]);
    }
    let shallow = LanguageModelConfig::named("softmax", 11, 16, 1, 2)?;
    let shallow = LanguageModel::new(&shallow, seeded_weights(&VarMap::new(), 0, DType::F64, &Device::Cpu))?;
    let refused = model.next_logits_each(&[[1]], &mut [shallow.cache()?]);
    assert_refused(refused, &[each, "of 1 layers", "of 3 layers"]);
    for (cache, good) in caches.iter_mut().zip(&good) {
        assert_eq!(cache.len(), good.len());
        let [a, b] = [cache, &mut good.clone()].map(|cache| model.next_logits(&tokens(2).unwrap(), cache));
        assert_eq!(distance(&a?, &b?)?, 0.0);
    }
    let layer = &model.blocks()[0];
    let x = random("x", &[1, 3, 16])?;
    let mut cache = layer.attention().cache()?;
    let refused = layer.forward_sequences_cached(&x, &Sequences::of_lengths([2]), std::slice::from_mut(&mut cache));
    assert_refused(refused, &["Block::forward_sequences_cached", "end with 2"]);
    let wide = random("x", &[1, 3, 17])?;
    let refused = layer.attention().forward_sequences_cached(&wide, &Sequences::of_lengths([3]), &mut [&mut cache]);
    assert_refused(refused, &["Attention::forward_sequences_cached", "`x`", "[1, 3, 17]"]);
    let refused =
        layer.attention().forward_sequences_cached(&x.get(0)?, &Sequences::of_lengths([3]), &mut [&mut cache]);
    assert_refused(refused, &["Attention::forward_sequences_cached", "`x`", "1 first"]);
    assert!(cache.is_empty());
    Ok(())
}
