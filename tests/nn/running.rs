//! Running batches: every sequence is what it is alone.

use attn_kernels::nn::{LanguageModel, LanguageModelConfig, Request, RunningBatch, Sampler, SamplerConfig};
use candle_core::{DType, Device, Result, Tensor};

use super::models::model;
use super::{assert_refused, distance};

const VOCABULARY: u32 = 11;

fn greedy() -> Sampler {
    Sampler::new(SamplerConfig::default()).unwrap()
}

/// A prompt of that length, another one for another number.
fn prompt(number: usize, length: usize) -> Vec<u32> {
    (0..length).map(|i| ((i * i * 7 + i * number + number * number + i / 5) as u32) % VOCABULARY).collect()
}

/// What the model writes after a prompt alone.
fn alone(model: &LanguageModel, prompt: &[u32], sampler: Sampler, count: usize) -> Result<Vec<u32>> {
    let mut cache = model.cache()?;
    model.generate(prompt, sampler, &mut cache)?.take(count).collect()
}

/// 64 prompts of 1 to 500 tokens: a quarter joins late, some leave early, and each is what it is alone.
#[test]
fn many_prompts_of_any_length() -> Result<()> {
    const ROWS: usize = 64;
    const AT_FIRST: usize = 48;
    const TOKENS: usize = 10;
    const LEAVING: [usize; 3] = [5, 17, 40];
    let prompts: Vec<_> = (0..ROWS).map(|row| prompt(row, 1 + 499 * row * row / ((ROWS - 1) * (ROWS - 1)))).collect();
    assert_eq!((prompts[0].len(), prompts[ROWS - 1].len()), (1, 500));
    let request = |row: usize| Request { limit: Some(TOKENS), ..Request::new(&prompts[row], greedy()) };
    for name in LanguageModelConfig::NAMES {
        let (_, model) = model(name, DType::F32)?;
        let (mut batch, mut written) = (RunningBatch::new(&model), vec![Vec::new(); ROWS]);
        (0..AT_FIRST).try_for_each(|row| batch.add(request(row)).map(|_| ()))?;
        let mut late = AT_FIRST..ROWS;
        for step in 1.. {
            for (row, token) in batch.step()? {
                written[row].push(token?);
            }
            for row in late.by_ref().take(4) {
                assert_eq!(batch.add(request(row))?, row);
            }
            if step == 3 {
                for row in LEAVING {
                    let cache = batch.remove(row).unwrap();
                    assert_eq!(cache.len(), prompts[row].len() + written[row].len() - 1);
                }
            }
            if batch.is_empty() {
                break;
            }
        }
        let mut seen = std::collections::HashSet::new();
        for (row, written) in written.iter().enumerate() {
            assert_eq!(written.len(), if LEAVING.contains(&row) { 3 } else { TOKENS }, "{name}, sequence {row}");
            let alone = alone(&model, &prompts[row], greedy(), written.len())?;
            assert_eq!(*written, alone, "{name}, sequence {row}");
            seen.extend(alone);
        }
        assert!(seen.len() > 1, "{name} writes {seen:?} only");
    }
    Ok(())
}

/// Seeds, ends and beginnings of each sequence's own; the iterator goes on while others join.
#[test]
fn sequences_have_choices_of_their_own() -> Result<()> {
    let random = |seed| {
        let config =
            SamplerConfig { temperature: 1.0, top_p: Some(0.9), repetition_penalty: 1.1, seed, ..Default::default() };
        Sampler::new(config).unwrap()
    };
    for name in ["softmax", "retention", "flash"] {
        let (_, model) = model(name, DType::F32)?;
        let mut begun = model.cache()?;
        model.next_logits_each(&[prompt(9, 20)], std::slice::from_mut(&mut begun))?;
        let requests = (0..6).map(|row| {
            let request = Request::new(&prompt(row as usize, 3 + row as usize), random(row / 2));
            match row {
                0 => Request { limit: Some(1), ..request },
                1 => Request { until: vec![3, 7], limit: Some(40), ..request },
                2 | 3 => Request { limit: Some(9), cache: Some(begun.clone()), ..request },
                _ => Request { limit: Some(12), ..request },
            }
        });
        let requests: Vec<_> = requests.collect();
        let mut written = vec![Vec::new(); 6];
        let mut batch = model.generate_each(requests[..5].iter().cloned())?;
        while let Some(next) = batch.next() {
            let (row, token) = next?;
            written[row].push(token);
            if written[4].len() == 5 && !batch.is_running(5) && written[5].is_empty() {
                batch.add(requests[5].clone())?;
            }
        }
        assert!(batch.is_empty() && batch.bytes() == 0 && batch.step()?.is_empty());
        for (row, (request, written)) in requests.iter().zip(&written).enumerate() {
            let mut cache = request.cache.clone().map_or_else(|| model.cache(), Ok)?;
            let alone = model.generate(&request.prompt, request.sampler.clone(), &mut cache)?.until(&request.until);
            let alone: Vec<u32> = alone.take(request.limit.unwrap()).collect::<Result<_>>()?;
            assert_eq!(*written, alone, "{name}, sequence {row}");
        }
        assert!(written[1].len() < 40 && [3, 7].contains(written[1].last().unwrap()), "{name}: {:?}", written[1]);
        assert_ne!(written[2], written[3], "{name}");
    }
    Ok(())
}

/// A removed sequence's cache goes on alone, and those of running ones can be read.
#[test]
fn caches_come_out_again() -> Result<()> {
    let (_, model) = model("transnormer", DType::F32)?;
    let mut batch = model.generate_each((0..3).map(|row| Request::new(&prompt(row, 5 + row), greedy())))?;
    let mut first = Vec::new();
    for _ in 0..4 {
        first.push(batch.step()?.remove(1).1?);
    }
    assert_eq!((batch.len(), batch.cache(1).map(|cache| cache.len())), (3, Some(6 + 3)));
    assert!(batch.bytes() > 0 && batch.is_running(1));
    let mut cache = batch.remove(1).unwrap();
    assert!(!batch.is_running(1) && batch.remove(1).is_none() && batch.cache(1).is_none() && batch.remove(7).is_none());
    let rest = model.generate(&first[3..], greedy(), &mut cache)?.take(4).collect::<Result<Vec<_>>>()?;
    assert_eq!([first, rest].concat(), alone(&model, &prompt(1, 6), greedy(), 8)?);
    // The iterator returns a step's tokens one by one; a sequence that is removed meanwhile takes its own along.
    let (row, _) = batch.next().unwrap()?;
    assert_eq!(row, 0);
    assert!(batch.remove(2).is_some());
    assert_eq!(batch.next().unwrap()?.0, 0);
    Ok(())
}

/// Logits without a number end a sequence, and only that.
#[test]
fn an_error_of_one_is_its_own() -> Result<()> {
    let (variables, model) = model("linear", DType::F32)?;
    let name = "embed_tokens.weight";
    let embedding = variables.data().lock().unwrap()[name].clone();
    let mut rows = embedding.to_vec2::<f32>()?;
    rows[9].fill(f32::NAN);
    embedding.set(&Tensor::new(rows, &Device::Cpu)?)?;
    let prompts = [vec![1, 2, 3], vec![4, 9, 5], vec![6, 7]];
    let request = |prompt: &Vec<u32>| Request { limit: Some(5), ..Request::new(prompt, greedy()) };
    let mut batch = model.generate_each(prompts.iter().map(request))?;
    let (mut written, mut errors) = (vec![Vec::new(); 3], Vec::new());
    for next in &mut batch {
        match next {
            Ok((row, token)) => written[row].push(token),
            Err(error) => errors.push(error.to_string()),
        }
    }
    assert!(errors.len() == 1 && errors[0].contains("sequence 1") && errors[0].contains("number"), "{errors:?}");
    for row in [0, 2] {
        assert_eq!(written[row], alone(&model, &prompts[row], greedy(), 5)?);
    }
    assert!(written[1].is_empty());
    Ok(())
}

#[test]
fn what_cannot_run_is_refused() -> Result<()> {
    let (_, model) = model("softmax", DType::F32)?;
    let mut batch = model.generate_each([Request::new(&[1, 2], greedy())])?;
    let plain = || Request::new(&[3], greedy());
    let mut several = model.cache()?;
    model.next_logits(&Tensor::new(&[[1u32], [2]], &Device::Cpu)?, &mut several)?;
    let other = super::models::model("linear", DType::F32)?.1.cache()?;
    let refused = [
        (Request::new(&[], greedy()), vec!["`prompt` is empty"]),
        (Request::new(&[1, VOCABULARY, 2], greedy()), vec!["`prompt` is 11", "vocabulary of 11"]),
        (Request { limit: Some(0), ..plain() }, vec!["`limit` is 0"]),
        (Request { cache: Some(several), ..plain() }, vec!["`cache`", "of 2 sequences"]),
        (Request { cache: Some(other), ..plain() }, vec!["`cache`", "linear"]),
    ];
    for (request, words) in refused {
        assert_refused(batch.add(request), &[&["RunningBatch::add"], &words[..]].concat());
    }
    assert_refused(model.generate_each([]), &["LanguageModel::generate_each", "`requests` is empty"]);
    assert_refused(model.generate_each([plain(), Request::new(&[], greedy())]), &["RunningBatch::add", "`prompt`"]);
    // Numbers are not used up by what is refused, and what runs does not notice.
    let first = batch.step()?.remove(0).1?;
    assert_eq!(vec![first], alone(&model, &[1, 2], greedy(), 1)?);
    assert_eq!(batch.add(plain())?, 1);
    Ok(())
}

/// Bits of the logits, not the tokens alone.
#[test]
fn caches_are_those_of_sequences_alone() -> Result<()> {
    for name in LanguageModelConfig::NAMES {
        let (_, model) = model(name, DType::F32)?;
        let mut batch = model.generate_each((0..5).map(|row| Request::new(&prompt(row, 1 + 13 * row), greedy())))?;
        for _ in 0..4 {
            batch.step()?;
        }
        for row in (0..5).rev() {
            let (mut cache, mut expected) = (batch.remove(row).unwrap(), model.cache()?);
            model.generate(&prompt(row, 1 + 13 * row), greedy(), &mut expected)?.take(4).collect::<Result<Vec<_>>>()?;
            let next = Tensor::new(&[[1u32, 2, 3]], &Device::Cpu)?;
            let [a, b] = [&mut cache, &mut expected].map(|cache| model.forward_cached(&next, cache));
            assert_eq!(distance(&a?, &b?)?, 0.0, "{name}, sequence {row}");
        }
    }
    Ok(())
}
