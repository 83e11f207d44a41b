use attn_kernels::nn::{
    Attention, FeedForward, LanguageModel, LanguageModelConfig, ModelCache, Norm, NormPlacement, Sampler,
    SamplerConfig, seeded_weights,
};
use candle_core::{D, DType, Device, Module, Result, Tensor};
use candle_nn::{Optimizer, VarMap};

use super::{Scratch, WIDTH, assert_close, assert_refused, distance, enlarge, is_trained};

const VOCABULARY: usize = 11;

pub fn model(name: &str, dtype: DType) -> Result<(VarMap, LanguageModel)> {
    let mut config = LanguageModelConfig::named(name, VOCABULARY, 16, 3, 2)?;
    // Blocks and chunks that a short sequence crosses.
    for mechanism in std::iter::once(&mut config.attention.mechanism).chain(&mut config.second_half) {
        use attn_kernels::nn::Mechanism::{Diag, Flash, Gau};
        match mechanism {
            Diag { block, .. } => *block = 6,
            Flash { chunk, key_width, .. } => (*chunk, *key_width) = (6, 8),
            Gau { key_width, bias_reach, .. } => (*key_width, *bias_reach) = (8, Some(4)),
            _ => {}
        }
    }
    let variables = VarMap::new();
    let model = LanguageModel::new(&config, seeded_weights(&variables, 1, dtype, &Device::Cpu))?;
    enlarge(&variables)?;
    Ok((variables, model))
}

fn tokens(batch: usize, count: usize) -> Result<Tensor> {
    let tokens = (0..batch * count).map(|index| (index * index * 7 + index / 5) as u32 % VOCABULARY as u32);
    Tensor::from_vec(tokens.collect::<Vec<u32>>(), (batch, count), &Device::Cpu)
}

#[test]
fn decoding_is_the_whole() -> Result<()> {
    let tokens = tokens(2, 20)?;
    for name in LanguageModelConfig::NAMES {
        let (_, model) = model(name, DType::F64)?;
        let whole = model.forward(&tokens)?;
        assert_eq!(whole.dims(), [2, 20, VOCABULARY]);
        let mut cache = model.cache()?;
        let prompt = model.forward_cached(&tokens.narrow(1, 0, 9)?, &mut cache)?;
        assert_close(&prompt, &whole.narrow(1, 0, 9)?, 1e-11, name)?;
        for step in 9..13 {
            let logits = model.next_logits(&tokens.narrow(1, step, 1)?, &mut cache)?;
            assert_close(&logits, &whole.narrow(1, step, 1)?.squeeze(1)?, 1e-11, name)?;
        }
        let logits = model.next_logits(&tokens.narrow(1, 13, 7)?, &mut cache)?;
        assert_close(&logits, &whole.narrow(1, 19, 1)?.squeeze(1)?, 1e-11, name)?;
        assert_eq!((cache.len(), cache.layers().len()), (20, 3));
        assert!(cache.bytes() > 0);
    }
    Ok(())
}

/// Greedy generation by steps, against the whole sequence anew for every token.
#[test]
fn generation_is_that_of_the_whole() -> Result<()> {
    for name in LanguageModelConfig::NAMES {
        let (_, model) = model(name, DType::F32)?;
        let mut sequence = vec![3u32, 1, 4, 1, 5];
        let mut cache = model.cache()?;
        let greedy = Sampler::new(SamplerConfig::default())?;
        let generated: Vec<u32> = model.generate(&sequence, greedy, &mut cache)?.take(30).collect::<Result<_>>()?;
        for token in generated {
            let logits = model.forward(&Tensor::new(&sequence[..], &Device::Cpu)?.unsqueeze(0)?)?;
            let last = logits.get(0)?.get(sequence.len() - 1)?;
            assert_eq!(last.argmax(D::Minus1)?.to_scalar::<u32>()?, token, "{name} at {}", sequence.len());
            sequence.push(token);
        }
        // The last token has not been read yet.
        assert_eq!(cache.len(), sequence.len() - 1);
    }
    Ok(())
}

#[test]
fn the_future_does_not_matter() -> Result<()> {
    let tokens = tokens(1, 20)?;
    let other = Tensor::cat(&[tokens.narrow(1, 0, 12)?, tokens.narrow(1, 3, 8)?], 1)?;
    for name in LanguageModelConfig::NAMES {
        let (_, model) = model(name, DType::F64)?;
        let (a, b) = (model.forward(&tokens)?, model.forward(&other)?);
        assert_close(&a.narrow(1, 0, 12)?, &b.narrow(1, 0, 12)?, 1e-12, name)?;
        assert!(distance(&a.narrow(1, 12, 1)?, &b.narrow(1, 12, 1)?)? > 1e-4, "{name} ignores its token");
        // Padding behind a mask changes nothing either.
        let mask = Tensor::cat(
            &[Tensor::ones((1, 12), DType::U8, &Device::Cpu)?, Tensor::zeros((1, 8), DType::U8, &Device::Cpu)?],
            1,
        )?;
        let masked = model.forward_masked(&other, Some(&mask))?;
        assert_close(&a.narrow(1, 0, 12)?, &masked.narrow(1, 0, 12)?, 1e-12, name)?;
    }
    Ok(())
}

#[test]
fn beams_and_stored_states() -> Result<()> {
    let tokens = tokens(2, 20)?;
    let swapped = tokens.index_select(&Tensor::new(&[1u32, 0], &Device::Cpu)?, 0)?;
    for name in LanguageModelConfig::NAMES {
        let (_, model) = model(name, DType::F64)?;
        let file = Scratch::new(&format!("model-state-{name}"));
        let whole = model.forward(&swapped)?.narrow(1, 13, 7)?;
        let mut cache = model.cache()?;
        model.forward_cached(&tokens.narrow(1, 0, 13)?, &mut cache)?;
        cache.reorder(&[1, 0])?;
        cache.save(&file.0)?;
        let mut loaded = model.cache()?;
        loaded.load(&file.0)?;
        for cache in [&mut cache, &mut loaded] {
            let out = model.forward_cached(&swapped.narrow(1, 13, 7)?, cache)?;
            assert_close(&out, &whole, 1e-11, name)?;
        }
        cache.clear();
        assert!(cache.is_empty() && cache.bytes() == 0);
        for other in LanguageModelConfig::NAMES.iter().filter(|other| **other != name) {
            let (_, other) = super::models::model(other, DType::F64)?;
            let mut theirs: ModelCache = other.cache()?;
            assert_refused(theirs.load(&file.0), &["model-state", "another configuration"]);
        }
    }
    Ok(())
}

/// If one layer cannot go back, none does.
#[test]
fn layers_go_back_together() -> Result<()> {
    let tokens = tokens(1, 20)?;
    let (_, model) = model("transnormer", DType::F64)?;
    let mut cache = model.cache()?;
    model.forward_cached(&tokens.narrow(1, 0, 9)?, &mut cache)?;
    assert_refused(cache.truncate(8), &["Cache::truncate", "norm"]);
    assert!(cache.layers().iter().all(|layer| layer.len() == 9));
    let out = model.forward_cached(&tokens.narrow(1, 9, 11)?, &mut cache)?;
    assert_close(&out, &model.forward(&tokens)?.narrow(1, 9, 11)?, 1e-11, "after a refusal")?;
    cache.truncate(0)?;
    assert!(cache.is_empty());
    Ok(())
}

/// A few steps of AdamW on one sequence: every weight moves, marks and random features stay.
#[test]
fn models_learn() -> Result<()> {
    let tokens = tokens(2, 13)?;
    let (inputs, targets) = (tokens.narrow(1, 0, 12)?, tokens.narrow(1, 1, 12)?.flatten_all()?);
    for name in LanguageModelConfig::NAMES {
        let (variables, model) = model(name, DType::F32)?;
        let named = || -> Result<Vec<(String, Tensor)>> {
            let data = variables.data().lock().unwrap();
            data.iter().map(|(name, variable)| Ok((name.clone(), variable.copy()?))).collect()
        };
        let before = named()?;
        let mut optimizer = candle_nn::AdamW::new_lr(variables.all_vars(), 0.01)?;
        let (mut first, mut last) = (None, 0f32);
        for _ in 0..40 {
            let logits = model.forward(&inputs)?.flatten_to(1)?;
            let loss = candle_nn::loss::cross_entropy(&logits, &targets)?;
            last = loss.to_scalar()?;
            first.get_or_insert(last);
            optimizer.backward_step(&loss)?;
        }
        let first = first.unwrap();
        assert!(last < 0.5 * first, "{name}: {first} to {last}");
        let after: std::collections::HashMap<_, _> = named()?.into_iter().collect();
        for (weight, old) in before {
            let moved = distance(&after[&weight], &old)?;
            assert_eq!(moved > 0.0, is_trained(&weight), "{name}: {weight} moved by {moved}");
        }
    }
    Ok(())
}

#[test]
fn features_of_all_layers_are_drawn_anew() -> Result<()> {
    let tokens = tokens(1, 9)?;
    let (_, mut model) = model("performer", DType::F32)?;
    let before = model.forward(&tokens)?;
    model.redraw(40)?;
    let seeds: Vec<_> = model.blocks().iter().map(|block| block.attention().seed()).collect::<Result<_>>()?;
    assert_eq!(seeds, [Some(40), Some(41), Some(42)]);
    assert!(distance(&model.forward(&tokens)?, &before)? > 1e-4);
    model.redraw(0)?;
    assert_eq!(distance(&model.forward(&tokens)?, &before)?, 0.0);
    assert_refused(super::models::model("linear", DType::F32)?.1.redraw(1), &["LanguageModel::redraw", "performer"]);
    Ok(())
}

/// A model of every placement of norms, with all that the embedding and the head may have, out of its parts.
#[test]
fn norms_stand_where_they_are_put() -> Result<()> {
    let placements = [NormPlacement::Before, NormPlacement::Around, NormPlacement::Behind, NormPlacement::After];
    for norms in placements {
        let usual = LanguageModelConfig::named("softmax", VOCABULARY, WIDTH, 2, 2)?;
        let config = LanguageModelConfig {
            norms,
            positions: Some(9),
            embedding_scale: Some(3.0),
            logit_soft_cap: Some(0.5),
            ..usual
        };
        let variables = VarMap::new();
        let weights = seeded_weights(&variables, 5, DType::F64, &Device::Cpu);
        let model = LanguageModel::new(&config, weights.clone())?;
        enlarge(&variables)?;
        let tokens = tokens(2, 9)?;
        let norm = |name: String| Norm::new(WIDTH, &config.norm, weights.pp(name));
        let table = |name: &str, rows: usize| weights.pp(name).get((rows, WIDTH), "weight");
        let rows =
            table("embed_tokens", VOCABULARY)?.index_select(&tokens.flatten_all()?, 0)?.reshape((2, 9, WIDTH))?;
        let mut x = (rows * 3.0)?.broadcast_add(&table("embed_positions", 9)?)?;
        if norms == NormPlacement::After {
            x = norm("embed_norm".into())?.forward(&x)?;
        }
        for layer in 0..2 {
            let at = |name: &str| format!("layers.{layer}.{name}");
            let attention = Attention::new(&config.attention(layer), weights.pp(at("self_attn")))?;
            let feed_forward = FeedForward::new(WIDTH, &config.feed_forward.unwrap(), weights.pp(at("mlp")))?;
            let [input, attended, fed] = ["input_layernorm", "post_attention_layernorm", "post_feedforward_layernorm"]
                .map(|name| norm(at(name)));
            x = match norms {
                NormPlacement::Before => {
                    let y = (&x + attention.forward(&input?.forward(&x)?)?)?;
                    (&y + feed_forward.forward(&attended?.forward(&y)?)?)?
                }
                NormPlacement::Around => {
                    let y = (&x + attended?.forward(&attention.forward(&input?.forward(&x)?)?)?)?;
                    let before = norm(at("pre_feedforward_layernorm"))?.forward(&y)?;
                    (&y + fed?.forward(&feed_forward.forward(&before)?)?)?
                }
                NormPlacement::Behind => {
                    let y = (&x + attended?.forward(&attention.forward(&x)?)?)?;
                    (&y + fed?.forward(&feed_forward.forward(&y)?)?)?
                }
                NormPlacement::After => {
                    let y = attended?.forward(&(&x + attention.forward(&x)?)?)?;
                    fed?.forward(&(&y + feed_forward.forward(&y)?)?)?
                }
            };
        }
        if norms != NormPlacement::After {
            x = norm("norm".into())?.forward(&x)?;
        }
        assert_close(&model.hidden(&tokens, None)?, &x, 1e-12, &format!("{norms:?}, rows"))?;
        let logits = x.broadcast_matmul(&table("lm_head", VOCABULARY)?.t()?)?;
        let logits = ((logits / 0.5)?.tanh()? * 0.5)?;
        assert_close(&model.forward(&tokens)?, &logits, 1e-12, &format!("{norms:?}"))?;
        let mut cache = model.cache()?;
        let pieces =
            [0..4, 4..5, 5..9].map(|rows| model.forward_cached(&tokens.narrow(1, rows.start, rows.len())?, &mut cache));
        let pieces = pieces.into_iter().collect::<Result<Vec<_>>>()?;
        assert_close(&Tensor::cat(&pieces, 1)?, &logits, 1e-12, &format!("{norms:?}, cached"))?;
        assert_refused(
            model.next_logits(&tokens.narrow(1, 0, 1)?, &mut cache),
            &["next_logits", "10 in a", "at most 9"],
        );
        assert_eq!(cache.len(), 9);
    }
    Ok(())
}
