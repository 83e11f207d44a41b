use super::{folder, has_share, json, refuses, succeeds};

#[test]
fn states_stay_and_caches_grow() {
    let out = folder("decode");
    let run = ["--lengths", "64,256", "--batch", "1,3", "--width", "32", "--samples", "3", "--out"];
    let printed = succeeds("decode", &[&run[..], &[out.to_str().unwrap()]].concat());
    assert!(printed.contains("of bound") && printed.contains("Bound: the longer of"), "{printed}");
    let records = json(out.join("decode.json"));
    let records = records.as_array().unwrap();
    assert_eq!(records.len(), 8 * 2 * 2);
    records.iter().for_each(has_share);
    // A batch shares the weights: three sequences cost less than three times the bytes.
    let bound = |batch: u64| {
        let found = records.iter().find(|record| record["batch"] == batch && record["mechanism"] == "linear");
        let number = |name: &str| found.unwrap()[name].as_f64().unwrap();
        number("bound_ms") * number("bound_gbytes_per_s")
    };
    assert!(bound(3) < 3.0 * bound(1) && bound(3) > bound(1), "{} {}", bound(1), bound(3));
    for pair in records.chunks(2) {
        let bytes = |at: usize| pair[at]["cache_bytes"].as_u64().unwrap();
        let step = |at: usize| pair[at]["step_bytes"].as_u64().unwrap();
        assert!(bytes(0) > 0 && pair[0]["median_ms"].as_f64().unwrap() > 0.0);
        if pair[0]["mechanism"] == "softmax" {
            // Rows and room for half as many again.
            assert!(bytes(1) > 3 * bytes(0), "{pair:?}");
        } else {
            assert_eq!((bytes(0), step(0)), (bytes(1), step(1)), "{pair:?}");
        }
    }
    for name in ["decode_batch_1.svg", "decode_batch_3.svg", "decode_memory.svg"] {
        assert!(std::fs::read_to_string(out.join(name)).unwrap().contains("softmax"), "{name}");
    }
}

#[test]
fn a_device_that_is_missing_is_refused() {
    if cfg!(feature = "cuda") {
        eprintln!("SKIPPED: with the feature `cuda` a GPU may be there");
        return;
    }
    refuses("decode", &["--device", "gpu"], &["--device gpu", "feature `cuda`"]);
}
