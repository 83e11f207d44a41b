//! Published models against the numbers of the programs that they come from (`scripts/golden.py`).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use attn_kernels::nn::models::Published;
use attn_kernels::nn::{LanguageModel, cross_entropy};
use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::VarMap;

use super::{Scratch, assert_refused};

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
    let largest = |x: &Tensor| x.abs()?.max_all()?.to_dtype(DType::F64)?.to_scalar::<f64>();
    Ok(largest(&(got - expected)?)? / largest(expected)?)
}

fn assert_near(got: &Tensor, expected: &Tensor, bound: f64, what: &str) -> Result<()> {
    let error = relative(got, expected)?;
    println!("{what}: {error:.1e}");
    // Not a number is no agreement.
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
fn hidden_states_of_encoders() -> Result<()> {
    for golden in all()?.into_iter().filter(Golden::is_encoder) {
        let encoder = Published::open(&golden.folder)?.encoder(DType::F32, &CPU)?;
        let mask = golden.get("mask").to_dtype(DType::U8)?;
        let types = golden.tensors.get("token_types").map(|types| types.to_dtype(DType::U32)).transpose()?;
        let rows = encoder.forward_masked(&golden.tokens()?, types.as_ref(), Some(&mask))?;
        // Rows of padding are not compared: nobody reads them.
        let seen = mask.to_dtype(DType::F32)?.unsqueeze(2)?;
        let [got, expected] = [&rows, golden.get("hidden")].map(|rows| rows.broadcast_mul(&seen));
        assert_near(&got?, &expected?, LOGITS, &format!("{}, rows", golden.name))?;
        assert_near(&encoder.pooled(&rows)?, golden.get("pooled"), LOGITS, &format!("{}, pooled", golden.name))?;
    }
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
        let variables = variables.data().lock().unwrap();
        let expected =
            golden.tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix("gradient.")?, tensor)));
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
    }
    Ok(())
}

/// A copy of a folder, to spoil.
fn copied(golden: &Golden) -> Scratch {
    let folder = Scratch::new(&format!("spoiled-{}", golden.name));
    fs::create_dir_all(&folder.0).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden.folder.join(name), folder.0.join(name)).unwrap();
    }
    folder
}

fn with_field(folder: &Path, name: &str, value: serde_json::Value) {
    let path = folder.join("config.json");
    let mut config: serde_json::Map<_, _> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config.insert(name.into(), value);
    fs::write(path, serde_json::to_string(&config).unwrap()).unwrap();
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
