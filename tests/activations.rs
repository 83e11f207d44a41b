//! Real activations: layer 3 of a sentence-embedding model (MiniLM), with its padding mask and its softmax attention.

use attn_kernels::problem::{DType, Mask};
use attn_kernels::reference::Array;
use attn_kernels::softmax::SoftmaxOptions;
use safetensors::SafeTensors;

use crate::common::backends::{self, Pass};
use crate::common::cases::{Case, Extra, Operation};
use crate::common::data::Data;
use crate::common::options::Extras;

fn floats(file: &SafeTensors<'_>, name: &str) -> Array {
    let tensor = file.tensor(name).unwrap();
    let data =
        tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).into()).collect();
    Array { data, shape: tensor.shape().try_into().unwrap() }
}

#[test]
fn softmax_of_minilm() {
    let bytes = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/minilm_layer3.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let [q, k, v, expected] = ["q", "k", "v", "out"].map(|name| floats(&file, name));
    let mask = file.tensor("key_mask").unwrap();
    let key_mask = mask.data().iter().map(|&keep| keep.into()).collect();
    let key_mask = Array { data: key_mask, shape: [1, 1, mask.shape()[0], mask.shape()[1]] };
    assert!(key_mask.data.contains(&0.0), "no padding in the data");
    let options = SoftmaxOptions { mask: Mask::Full, key_mask: Some(Extra::SomeKeys), ..Default::default() };
    let case = Case::new("MiniLM", Operation::Softmax(options));
    let case = case.batch(2).heads(12, 12, 12).lengths(256, 256).widths(32, 32);
    let extras = Extras { key_mask: Some(key_mask), ..Extras::default() };
    let data = Data { q, k, v, extras, ..Data::new(&case, DType::F32) };
    for backend in backends::all().iter().filter(|backend| backend.is_available()) {
        let results = backend.run(&case, &data, DType::F32, Pass::Forward).unwrap();
        let differences = results.out().data.iter().zip(&expected.data).map(|(x, y)| (x - y).abs());
        let worst = differences.fold(0.0, |worst: f64, x| if x.is_nan() { x } else { worst.max(x) });
        assert!(worst <= 2e-6, "{}: {worst:e}", backend.name());
    }
}
