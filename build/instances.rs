//! The instance lists of kernel files: lines `ATTN_KERNEL(name, body<…>, Params, threads)`.

/// One kernel of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(dead_code, reason = "the build needs the names alone")]
pub struct Instance {
    pub kernel: String,
    /// Name of the parameter struct, without namespaces and template arguments.
    pub params: String,
    /// Threads in a block, as written.
    pub threads: String,
}

/// The instances in the text of a kernel file, in order.
pub fn parse(text: &str) -> Result<Vec<Instance>, String> {
    let is_code = |line: &&str| !line.trim_start().starts_with('#');
    let lines: Vec<&str> = text.lines().filter(is_code).filter_map(|line| line.split("//").next()).collect();
    let text = lines.join("\n");
    text.split("ATTN_KERNEL(").skip(1).map(instance).collect()
}

/// From what follows an opening parenthesis. Commas inside `body<…>` do no harm: it stands in the middle.
fn instance(rest: &str) -> Result<Instance, String> {
    let mut depth = 1;
    let end = rest.find(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth == 0
    });
    let list = &rest[..end.ok_or("an ATTN_KERNEL without its closing parenthesis")?];
    let items: Vec<&str> = list.split(',').map(str::trim).collect();
    let [kernel, _, .., params, threads] = items[..] else {
        return Err(format!("ATTN_KERNEL({list}) needs name, body, Params, threads"));
    };
    let params = params.split('<').next().and_then(|name| name.rsplit("::").next()).unwrap_or(params);
    Ok(Instance { kernel: kernel.into(), params: params.into(), threads: threads.into() })
}
