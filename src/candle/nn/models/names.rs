//! What published models call the weights of this crate's layers.

/// Weights of ours and theirs: paths whose `*` is the number of a layer, and what follows them is the same in both.
#[derive(Debug)]
pub struct Rule {
    pub ours: &'static str,
    pub theirs: &'static str,
    pub part: Part,
}

/// Which part of a published tensor a weight is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    Whole,
    /// Of a matrix `[input, output]`.
    Across,
    /// The i-th of n equal parts of the outputs, of a matrix `[input, output]`.
    PieceAcross(usize, usize),
}

impl Rule {
    pub const fn new(ours: &'static str, theirs: &'static str) -> Self {
        Self { ours, theirs, part: Part::Whole }
    }

    pub const fn part(self, part: Part) -> Self {
        Self { part, ..self }
    }

    /// Their path of `name`, if the rule is for it.
    fn apply(&self, name: &str) -> Option<String> {
        let (mut rest, mut layer) = (name.split('.'), "");
        for segment in self.ours.split('.') {
            let found = rest.next()?;
            match segment {
                "*" if found.bytes().all(|byte| byte.is_ascii_digit()) => layer = found,
                _ if segment == found => {}
                _ => return None,
            }
        }
        let theirs = self.theirs.split('.').map(|segment| if segment == "*" { layer } else { segment });
        Some(theirs.chain(rest).collect::<Vec<_>>().join("."))
    }
}

/// The path of `name` by the first rule that is for it, else its own.
pub fn published(rules: &[Rule], name: &str) -> (String, Part) {
    let found = rules.iter().find_map(|rule| Some((rule.apply(name)?, rule.part)));
    found.unwrap_or_else(|| (name.to_string(), Part::Whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_rename_paths() {
        let rules = [
            Rule::new("layers.*.self_attn.q_proj", "h.*.attn.c_attn").part(Part::PieceAcross(0, 3)),
            Rule::new("layers.*.self_attn", "h.*.attn"),
            Rule::new("embed_tokens", "wte"),
        ];
        let of = |name| published(&rules, name);
        assert_eq!(of("layers.12.self_attn.q_proj.bias"), ("h.12.attn.c_attn.bias".into(), Part::PieceAcross(0, 3)));
        assert_eq!(of("layers.3.self_attn.o_proj.weight"), ("h.3.attn.o_proj.weight".into(), Part::Whole));
        assert_eq!(of("embed_tokens.weight"), ("wte.weight".into(), Part::Whole));
        assert_eq!(of("layers.x.self_attn.q"), ("layers.x.self_attn.q".into(), Part::Whole));
        assert_eq!(of("embed_tokens_2.weight"), ("embed_tokens_2.weight".into(), Part::Whole));
    }
}
