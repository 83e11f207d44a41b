//! What kernel files and the library say of each other: names, and parameters field by field.

use std::collections::BTreeSet;

use attn_kernels::gpu;
use attn_kernels::gpu::params::Type;

use crate::common::instances;
use crate::common::sources::{code, sources};

#[test]
fn names_are_unique() {
    let instances = instances::all();
    let names: BTreeSet<_> = instances.iter().map(|instance| &instance.kernel).collect();
    assert_eq!(names.len(), instances.len());
}

#[test]
fn parameters_have_the_same_fields() {
    let headers = sources(&["cu", "cuh"]);
    let text: String = headers.iter().flat_map(|(_, text)| code(text)).flat_map(|(_, line)| [line, "\n"]).collect();
    let twins = gpu::parameters();
    let used: BTreeSet<String> = instances::all().into_iter().map(|instance| instance.params).collect();
    let known: BTreeSet<String> = twins.iter().map(|twin| twin.name().to_string()).collect();
    assert_eq!(used, known, "structs that kernels take, and those of gpu::parameters");
    for twin in twins {
        compare(&text, &twin);
    }
}

/// Names and, where they are of built-in types, types of the fields; structs inside likewise, if a twin has the name.
fn compare(text: &str, twin: &Type) {
    let Type::Struct(name, fields) = twin else { panic!("{twin:?} is no struct") };
    let theirs = fields_of(text, name);
    let names = |field: &(String, String)| field.1.clone();
    let ours: Vec<String> = fields.iter().map(|(field, _)| field.to_string()).collect();
    assert_eq!(theirs.iter().map(names).collect::<Vec<_>>(), ours, "fields of {name}, there and here");
    for ((spelled, field), (_, ours)) in theirs.iter().zip(*fields) {
        let element = if let Type::Array(element, _) = ours { element } else { ours };
        let expected = match spelled.as_str() {
            pointer if pointer.ends_with('*') => Some(Type::Pointer),
            map if map.ends_with("TensorMap") => Some(Type::TensorMap),
            "int32_t" => Some(Type::I32),
            "uint32_t" => Some(Type::U32),
            "int64_t" => Some(Type::I64),
            "uint64_t" => Some(Type::U64),
            "float" => Some(Type::F32),
            "double" => Some(Type::F64),
            _ => None,
        };
        assert!(
            expected.is_none_or(|expected| expected == *element),
            "{name}::{field} is {spelled} there, {ours:?} here"
        );
        if let Type::Struct(inner, _) = element {
            let plain = spelled.split('<').next().and_then(|path| path.rsplit("::").next());
            assert_eq!(plain, Some(*inner), "type of {name}::{field}");
            compare(text, element);
        }
    }
}

/// Type and name of the fields of a struct in C++ text without comments.
fn fields_of(text: &str, name: &str) -> Vec<(String, String)> {
    let head = format!("struct {name} {{");
    let body = text.split(&head).nth(1).unwrap_or_else(|| panic!("no `{head}` in kernels"));
    let mut depth = 1;
    let mut own = String::new();
    for c in body.chars() {
        depth += i32::from(c == '{') - i32::from(c == '}');
        match (depth, c) {
            (0, _) => break,
            // The end of a function.
            (1, '}') => own.push(';'),
            (1, _) => own.push(c),
            _ => {}
        }
    }
    let statements = own.split(';').map(str::trim).filter(|text| !text.is_empty());
    let is_field = |text: &&str| !text.contains('(') && !text.starts_with("using ") && !text.starts_with("static ");
    statements.filter(is_field).flat_map(declared).collect()
}

/// Of `const float* q`, `int64_t batch, heads` or `int64_t pieces[kPieces]`.
fn declared(statement: &str) -> Vec<(String, String)> {
    let statement = statement.split('=').next().unwrap_or_default();
    let (first, others) = statement.split_once(',').unwrap_or((statement, ""));
    let (spelled, name) = first.trim().rsplit_once(char::is_whitespace).expect("a type and a name");
    let bare = |name: &str| name.split('[').next().unwrap_or_default().trim().to_string();
    let names = std::iter::once(name).chain(others.split(',')).map(bare).filter(|name| !name.is_empty());
    names.map(|name| (spelled.trim().to_string(), name)).collect()
}

#[test]
fn fields_are_found() {
    let text = "struct Mask { int32_t kind; };\ntemplate <class T>\nstruct P {\n  using Real = T;\n  const T* q;\n  Real* k;\n\
                int64_t batch, heads;\n tile::Strides q_strides;\n  DEVICE int f() const { return g({1}); }\n\
                int64_t pieces[kPieces];\n Mask mask; };";
    let found = fields_of(text, "P");
    let names: Vec<&str> = found.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["q", "k", "batch", "heads", "q_strides", "pieces", "mask"]);
    assert_eq!(found[0].0, "const T*");
    assert_eq!(found[4].0, "tile::Strides");
}
