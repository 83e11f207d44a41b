//! Published models against the numbers of the programs that they come from (`scripts/golden.py`).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use attn_kernels::Sequences;
use attn_kernels::nn::models::Published;
use attn_kernels::nn::{LanguageModel, LanguageModelConfig, Mechanism, cross_entropy};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarMap;

use super::{Scratch, assert_refused, distance};

const CPU: Device = Device::Cpu;

/// A folder of tests/data/models with what is to be seen of it.
struct Golden {
    name: String,
    folder: PathBuf,
    tensors: HashMap<String, Tensor>,
}

impl Golden {
    fn of(folder: PathBuf) -> Result<Self> {
        let tensors = candle_core::safetensors::load(folder.join("golden.safetensors"), &CPU)?;
        Ok(Self { name: folder.file_name().unwrap().to_string_lossy().into_owned(), folder, tensors })
    }

    fn named(name: &str) -> Result<Self> {
        Self::of(models().join(name))
    }

    fn is_encoder(&self) -> bool {
        !self.tensors.contains_key("logits")
    }

    fn get(&self, name: &str) -> &Tensor {
        &self.tensors[name]
    }

    fn tokens(&self) -> Result<Tensor> {
        self.get("tokens").to_dtype(DType::U32)
    }
}

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models")
}

fn all() -> Result<Vec<Golden>> {
    let folders = fs::read_dir(models()).unwrap().map(|entry| entry.unwrap().path());
    let mut all = folders.filter(|path| path.is_dir()).map(Golden::of).collect::<Result<Vec<_>>>()?;
    all.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(all)
}

fn language_models() -> Result<impl Iterator<Item = Golden>> {
    Ok(all()?.into_iter().filter(|golden| !golden.is_encoder()))
}

/// The largest difference, relative to the largest number.
fn relative(got: &Tensor, expected: &Tensor) -> Result<f64> {
    Ok(distance(got, expected)? / distance(expected, &expected.zeros_like()?)?)
}

fn assert_near(got: &Tensor, expected: &Tensor, bound: f64, what: &str) -> Result<()> {
    let error = relative(got, expected)?;
    println!("{what}: {error:.1e}");
    assert!(error <= bound, "{what}: {error:e} relative, at most {bound:e}");
    Ok(())
}

const LOGITS: f64 = 2e-5;
const GRADIENTS: f64 = 1e-4;

#[test]
fn logits() -> Result<()> {
    for golden in language_models()? {
        let model = Published::open(&golden.folder)?.language_model(DType::F32, &CPU)?;
        assert_near(&model.forward(&golden.tokens()?)?, golden.get("logits"), LOGITS, &golden.name)?;
    }
    Ok(())
}

#[test]
fn encoders() -> Result<()> {
    for golden in all()?.into_iter().filter(Golden::is_encoder) {
        let (variables, published) = (VarMap::new(), Published::open(&golden.folder)?);
        let mask = golden.get("mask").to_dtype(DType::U8)?;
        let types = golden.get("token_types").to_dtype(DType::U32)?;
        let [fixed, trained] =
            [published.encoder(DType::F32, &CPU)?, published.trainable_encoder(&variables, DType::F32, &CPU)?];
        let rows = trained.forward_masked(&golden.tokens()?, Some(&types), Some(&mask))?;
        let pooled = trained.pooled(&rows)?;
        assert_near(&rows, golden.get("hidden"), LOGITS, &format!("{}, rows", golden.name))?;
        assert_near(&pooled, golden.get("pooled"), LOGITS, &format!("{}, pooled", golden.name))?;
        let alike = fixed.forward_masked(&golden.tokens()?, Some(&types), Some(&mask))?;
        assert_eq!(distance(&alike, &rows)?, 0.0, "{}", golden.name);
        let loss = (rows.powf(3.0)?.mean_all()? + pooled.powf(3.0)?.mean_all()?)?;
        assert_gradients(&golden, &variables, &loss.backward()?)?;
    }
    Ok(())
}

/// The gradients that are recorded; the variables have the published names.
fn assert_gradients(golden: &Golden, variables: &VarMap, gradients: &GradStore) -> Result<()> {
    let variables = variables.data().lock().unwrap();
    let expected = golden.tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("gradient.")?, tensor)));
    let mut count = 0;
    for (name, expected) in expected {
        let got = variables.get(name).and_then(|variable| gradients.get(variable));
        let got = got.unwrap_or_else(|| panic!("{}: no gradient of {name}", golden.name));
        assert_near(got, expected, GRADIENTS, &format!("{}, {name}", golden.name))?;
        count += 1;
    }
    assert!(count >= 3, "{}: {count} gradients", golden.name);
    // Every published tensor is trained.
    let idle: Vec<_> = variables.iter().filter(|(_, variable)| gradients.get(variable).is_none()).collect();
    assert!(idle.is_empty(), "{}: no gradient of {:?}", golden.name, idle.iter().map(|(name, _)| name));
    Ok(())
}

#[test]
fn what_an_encoder_cannot_take_is_refused() -> Result<()> {
    let golden = Golden::named("bert")?;
    let encoder = Published::open(&golden.folder)?.encoder(DType::F32, &CPU)?;
    let tokens = golden.tokens()?;
    let refused = |types: &Tensor, words: &[&str]| {
        assert_refused(
            encoder.forward_masked(&tokens, Some(types), None),
            &[&["Encoder::forward", "`types`"], words].concat(),
        );
    };
    refused(&tokens.narrow(1, 0, 3)?, &["[2, 3]", "[2, 44]"]);
    refused(&tokens.to_dtype(DType::F32)?, &["f32", "u32"]);
    refused(&(tokens.zeros_like()? + 2.0)?, &["2 somewhere", "below 2"]);
    let long = Tensor::zeros((1, 65), DType::U32, &CPU)?;
    assert_refused(encoder.forward(&long), &["Encoder::forward", "`tokens`", "65 in a sequence", "at most 64"]);
    let far = Tensor::full(64u32, (1, 2), &CPU)?;
    assert_refused(encoder.forward(&far), &["Encoder::forward", "64 somewhere", "vocabulary of 64"]);
    assert_refused(encoder.pooled(&tokens), &["Encoder::pooled", "`rows`", "[2, 44]"]);
    // Some are published without.
    let folder = copied(&golden);
    let path = folder.0.join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &CPU)?;
    tensors.retain(|name, _| !name.starts_with("pooler."));
    candle_core::safetensors::save(&tensors, &path)?;
    let headless = Published::open(&folder.0)?.encoder(DType::F32, &CPU)?;
    let rows = headless.forward(&tokens)?;
    assert_eq!(distance(&rows, &encoder.forward(&tokens)?)?, 0.0);
    assert_refused(headless.pooled(&rows), &["without pooler", "Encoder::mean"]);
    Ok(())
}

/// Sequences that are packed, or padded on the left: positions and windows are each one's own.
#[test]
fn sequences_are_alone_in_a_batch() -> Result<()> {
    for golden in language_models()? {
        let model = Published::open(&golden.folder)?.language_model(DType::F32, &CPU)?;
        let tokens = golden.tokens()?.get(0)?;
        let parts = [(0, 17), (17, 27)].map(|(first, count)| tokens.narrow(0, first, count)?.unsqueeze(0));
        let [short, long] = parts;
        let (short, long) = (short?, long?);
        let alone = [model.forward(&short)?, model.forward(&long)?];
        let packed = Tensor::cat(&[&short, &long], 1)?;
        let packed = model.forward_sequences(&packed, &Sequences::of_lengths([17, 27]))?;
        assert_near(&packed, &Tensor::cat(&alone, 1)?, LOGITS, &format!("{}, packed", golden.name))?;
        let padding = Tensor::zeros((1, 10), DType::U32, &CPU)?;
        let padded = Tensor::cat(&[Tensor::cat(&[&padding, &short], 1)?, long], 0)?;
        let mask: Vec<u8> = (0..2 * 27).map(|at| u8::from(at >= 10)).collect();
        let logits = model.forward_masked(&padded, Some(&Tensor::from_vec(mask, (2, 27), &CPU)?))?;
        let got = Tensor::cat(&[logits.narrow(0, 0, 1)?.narrow(1, 10, 17)?, logits.narrow(0, 1, 1)?], 1)?;
        assert_near(&got, &Tensor::cat(&alone, 1)?, LOGITS, &format!("{}, padded", golden.name))?;
    }
    Ok(())
}

/// Fields that are missing have the values of their family, null is none.
#[test]
fn missing_fields_are_those_of_the_family() -> Result<()> {
    let changed = |name: &str, field: &str, value: Option<serde_json::Value>| -> Result<_> {
        let folder = copied(&Golden::named(name)?);
        match value {
            Some(value) => with_field(&folder.0, field, value),
            None => without_field(&folder.0, field),
        }
        Ok(Published::open(&folder.0)?.config().clone())
    };
    let window = |mechanism: &Mechanism| match mechanism {
        Mechanism::Softmax { window, .. } => *window,
        other => panic!("{other:?}"),
    };
    let null = Some(serde_json::Value::Null);
    assert_eq!(window(changed("mistral", "sliding_window", None)?.mechanism(0)), Some(4096));
    assert_eq!(window(changed("mistral", "sliding_window", null.clone())?.mechanism(0)), None);
    assert_eq!(changed("gemma2", "final_logit_softcapping", None)?.logit_soft_cap, Some(30.0));
    assert_eq!(changed("gemma2", "final_logit_softcapping", null)?.logit_soft_cap, None);
    assert_eq!(changed("qwen3", "head_dim", None)?.attention(0).head_width(), 128);
    // A window that is turned off.
    let off = changed("qwen3_odd", "use_sliding_window", Some(false.into()))?;
    assert!((0..off.layers).all(|layer| window(off.mechanism(layer)).is_none()));
    Ok(())
}

/// A prompt of 4 tokens, then one at a time.
#[test]
fn decoding() -> Result<()> {
    for golden in language_models()? {
        let model = Published::open(&golden.folder)?.language_model(DType::F32, &CPU)?;
        let (tokens, mut cache) = (golden.tokens()?, model.cache()?);
        let mut logits = vec![model.forward_cached(&tokens.narrow(1, 0, 4)?, &mut cache)?];
        for at in 4..tokens.dim(1)? {
            logits.push(model.forward_cached(&tokens.narrow(1, at, 1)?, &mut cache)?);
        }
        assert_near(&Tensor::cat(&logits, 1)?, golden.get("logits"), LOGITS, &golden.name)?;
    }
    Ok(())
}

fn loss(model: &LanguageModel, tokens: &Tensor) -> Result<Tensor> {
    let last = tokens.dim(1)? - 1;
    let logits = model.forward(tokens)?.narrow(1, 0, last)?;
    cross_entropy(&logits.flatten_to(1)?, &tokens.narrow(1, 1, last)?.flatten_all()?)
}

#[test]
fn gradients() -> Result<()> {
    for golden in language_models()? {
        let variables = VarMap::new();
        let model = Published::open(&golden.folder)?.trainable_language_model(&variables, DType::F32, &CPU)?;
        let gradients = loss(&model, &golden.tokens()?)?.backward()?;
        assert_gradients(&golden, &variables, &gradients)?;
    }
    Ok(())
}

/// What is saved opens again and is the trained model.
#[test]
fn saved_folders_open() -> Result<()> {
    for golden in language_models()? {
        let (variables, tokens) = (VarMap::new(), golden.tokens()?);
        let published = Published::open(&golden.folder)?;
        let model = published.trainable_language_model(&variables, DType::F32, &CPU)?;
        let before = model.forward(&tokens)?;
        for variable in variables.all_vars() {
            variable.set(&(variable.as_tensor() * 1.01)?)?;
        }
        let trained = model.forward(&tokens)?;
        assert!(relative(&trained, &before)? > 1e-4, "{}: variables move the model", golden.name);
        let folder = Scratch::new(&format!("published-{}", golden.name));
        published.save(&variables, &folder.0)?;
        let loaded = Published::open(&folder.0)?.language_model(DType::F32, &CPU)?;
        assert_eq!(relative(&loaded.forward(&tokens)?, &trained)?, 0.0, "{}", golden.name);
        assert_refused(published.save(&variables, &golden.folder), &["the folder that the model comes from"]);
        let config = LanguageModelConfig { logit_soft_cap: Some(7.0), ..published.config().clone() };
        let other = published.with_config(config);
        assert!(relative(&other.language_model(DType::F32, &CPU)?.forward(&tokens)?, &before)? > 1e-4);
        assert_refused(other.save(&variables, &folder.0), &["another configuration", "VarMap::save"]);
    }
    Ok(())
}

/// A copy of a folder, to spoil.
fn copied(golden: &Golden) -> Scratch {
    // Tests run beside each other.
    static COPIES: AtomicUsize = AtomicUsize::new(0);
    let copy = COPIES.fetch_add(1, Ordering::Relaxed);
    let folder = Scratch::new(&format!("spoiled-{}-{copy}", golden.name));
    fs::create_dir_all(&folder.0).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden.folder.join(name), folder.0.join(name)).unwrap();
    }
    folder
}

fn change_fields(folder: &Path, change: impl FnOnce(&mut serde_json::Map<String, serde_json::Value>)) {
    let path = folder.join("config.json");
    let mut config = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut config);
    fs::write(path, serde_json::to_string(&config).unwrap()).unwrap();
}

fn with_field(folder: &Path, name: &str, value: serde_json::Value) {
    change_fields(folder, |config| drop(config.insert(name.into(), value)));
}

fn without_field(folder: &Path, name: &str) {
    change_fields(folder, |config| assert!(config.remove(name).is_some(), "no {name}"));
}

fn open(folder: &Path) -> Result<LanguageModel> {
    Published::open(folder)?.language_model(DType::F32, &CPU)
}

#[test]
fn configurations_that_are_not_supported_are_refused() -> Result<()> {
    let golden = Golden::named("llama")?;
    let refused = |name: &str, value: serde_json::Value, words: &[&str]| {
        let folder = copied(&golden);
        with_field(&folder.0, name, value);
        assert_refused(open(&folder.0), words);
    };
    refused("model_type", "llama5".into(), &["config.json", "`llama5`", "supported are llama"]);
    refused("shiny_new_part", true.into(), &["config.json", "`shiny_new_part` = true", "not supported"]);
    refused("hidden_size", "wide".into(), &["`hidden_size`", "wide"]);
    refused("hidden_size", serde_json::Value::Null, &["`hidden_size`", "missing"]);
    refused("num_attention_heads", 0.into(), &["heads", "at least 1"]);
    refused("num_attention_heads", 7.into(), &["config.json"]);
    refused("hidden_act", "tanh".into(), &["`tanh`", "silu"]);
    refused("rope_parameters", serde_json::json!({ "rope_type": "longrope" }), &["longrope", "llama3"]);
    refused("rope_scaling", serde_json::json!({ "rope_type": "linear" }), &["`rope_scaling` beside `rope_parameters`"]);
    refused("vocab_size", 7.into(), &["embed_tokens.weight", "shape"]);
    refused("num_hidden_layers", 1.into(), &["layers.1.input_layernorm.weight"]);
    refused("num_hidden_layers", 9.into(), &["no tensor `model.layers."]);
    let folder = copied(&golden);
    fs::write(folder.0.join("config.json"), "{").unwrap();
    assert_refused(open(&folder.0), &["config.json", "EOF"]);
    assert_refused(open(&folder.0.join("nowhere")), &["config.json", "nowhere"]);
    assert_refused(Published::open(models().join("llama"))?.encoder(DType::F32, &CPU), &["language model"]);
    let bert = Published::open(models().join("bert"))?;
    assert_refused(bert.language_model(DType::F32, &CPU), &["is an encoder"]);
    Ok(())
}

#[test]
fn weights_that_do_not_fit_are_refused() -> Result<()> {
    let golden = Golden::named("llama")?;
    let refused = |change: &dyn Fn(&mut HashMap<String, Tensor>), words: &[&str]| -> Result<()> {
        let folder = copied(&golden);
        let path = folder.0.join("model.safetensors");
        let mut tensors = candle_core::safetensors::load(&path, &CPU)?;
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, &path)?;
        assert_refused(open(&folder.0), words);
        Ok(())
    };
    let name = "model.layers.0.mlp.up_proj.weight";
    refused(&|tensors| drop(tensors.remove(name)), &["no tensor", name])?;
    refused(
        &|tensors| drop(tensors.insert(name.into(), Tensor::zeros((3, 5), DType::F32, &CPU).unwrap())),
        &[name, "[3, 5]"],
    )?;
    refused(
        &|tensors| drop(tensors.insert("model.extra".into(), tensors[name].clone())),
        &["`model.extra`", "no part"],
    )?;
    refused(&|tensors| drop(tensors.remove("model.embed_tokens.weight")), &["no tensor `model.embed_tokens.weight`"])?;
    let integers = Tensor::zeros(32, DType::I64, &CPU)?;
    refused(
        &|tensors| drop(tensors.insert("model.norm.weight".into(), integers.clone())),
        &["model.norm.weight", "I64"],
    )
}

/// Cut anywhere, or with a header of nonsense.
#[test]
fn damaged_files_are_errors() -> Result<()> {
    let golden = Golden::named("llama")?;
    let bytes = fs::read(golden.folder.join("model.safetensors")).unwrap();
    let folder = copied(&golden);
    let path = folder.0.join("model.safetensors");
    let cuts = (0..40).map(|i| bytes.len() * i / 40).chain([1, 7, 8, 9, bytes.len() - 1]);
    for cut in cuts {
        fs::write(&path, &bytes[..cut]).unwrap();
        assert_refused(open(&folder.0), &["model.safetensors"]);
    }
    let longer = [&bytes[..], &[0]].concat();
    fs::write(&path, longer).unwrap();
    assert_refused(open(&folder.0), &["model.safetensors", "damaged"]);
    for byte in 0..64 {
        let mut spoiled = bytes.clone();
        spoiled[byte] ^= 0x55;
        fs::write(&path, spoiled).unwrap();
        // Some names may change without harm; none crashes.
        drop(open(&folder.0));
    }
    fs::remove_file(&path).unwrap();
    assert_refused(open(&folder.0), &["model.safetensors"]);
    Ok(())
}

/// The same weights in two files and an index.
#[test]
fn shards_are_one_model() -> Result<()> {
    let golden = Golden::named("llama")?;
    let folder = copied(&golden);
    let tensors = candle_core::safetensors::load(folder.0.join("model.safetensors"), &CPU)?;
    fs::remove_file(folder.0.join("model.safetensors")).unwrap();
    let names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let (mut shards, mut index) = ([HashMap::new(), HashMap::new()], serde_json::Map::new());
    for (at, (name, tensor)) in tensors.iter().enumerate() {
        shards[at % 2].insert(name.clone(), tensor.clone());
        index.insert(name.clone(), names[at % 2].into());
    }
    for (name, shard) in names.iter().zip(&shards) {
        candle_core::safetensors::save(shard, folder.0.join(name))?;
    }
    let write = |index: &serde_json::Map<_, _>| {
        let text = serde_json::json!({ "metadata": {}, "weight_map": index }).to_string();
        fs::write(folder.0.join("model.safetensors.index.json"), text).unwrap();
    };
    write(&index);
    assert_near(&open(&folder.0)?.forward(&golden.tokens()?)?, golden.get("logits"), LOGITS, "shards")?;
    index.insert("other".into(), "../elsewhere.safetensors".into());
    write(&index);
    assert_refused(open(&folder.0), &["elsewhere", "not the name of a file in this folder"]);
    Ok(())
}
