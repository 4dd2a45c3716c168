//! What the benchmarks align: pairs of vocabularies with one long row each, cut into rows of any length.

use std::path::Path;

use xtokmap::{Aligner, Alignment, ByteTable, Ids, Kind, Layout, Rows};

/// A pair of vocabularies, and ids of both that spell the same bytes.
pub struct Pair {
    pub name: String,
    pub aligner: Aligner,
    pub student: Vec<u32>,
    pub teacher: Vec<u32>,
    pub student_lengths: Vec<u32>,
    pub teacher_lengths: Vec<u32>,
    whole: Alignment,
}

/// Rows of a pair, flat.
pub struct Batch<'a> {
    pair: &'a Pair,
    pub student: &'a [u32],
    pub teacher: &'a [u32],
    student_cu: Vec<i64>,
    teacher_cu: Vec<i64>,
}

impl Pair {
    fn new(name: String, tables: [ByteTable; 2], [student, teacher]: [Vec<u32>; 2]) -> Self {
        let lengths = |table: &ByteTable| table.iter().map(|bytes| bytes.len() as u32).collect();
        let [student_lengths, teacher_lengths] = [lengths(&tables[0]), lengths(&tables[1])];
        let [s, t] = tables;
        let aligner = Aligner::new(s, t).expect("vocabularies of less than 2^32 bytes");
        let whole = aligner.align(&student, &teacher).expect("ids of the vocabularies");
        assert!(whole.kind.iter().all(|&kind| kind < Kind::Rewritten), "{name}: the sides spell different bytes");
        Self { name, aligner, student, teacher, student_lengths, teacher_lengths, whole }
    }

    /// A pair that `benches/kernel_data.py` has written.
    pub fn read(path: &Path) -> std::io::Result<Self> {
        let data = std::fs::read(path)?;
        let mut rest = data.as_slice();
        let mut bytes = |n: usize| {
            let (taken, after) = rest.split_at(n);
            rest = after;
            taken
        };
        let number = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let mut table = || {
            let n = number(bytes(4)) as usize;
            let lengths: Vec<u32> = bytes(4 * n).chunks_exact(4).map(number).collect();
            let tokens: Vec<Option<&[u8]>> =
                lengths.iter().map(|&len| (len != u32::MAX).then(|| bytes(len as usize))).collect();
            ByteTable::from_tokens(tokens).expect("a vocabulary of less than 2^32 bytes")
        };
        let tables = [table(), table()];
        let mut ids = || {
            let n = number(bytes(4)) as usize;
            bytes(4 * n).chunks_exact(4).map(number).collect()
        };
        let ids = [ids(), ids()];
        let name = path.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
        Ok(Self::new(name, tables, ids))
    }

    /// The pairs in a folder, by name.
    pub fn read_all(folder: &Path) -> Vec<Self> {
        let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut files: Vec<_> = files.filter(|path| path.extension().is_some_and(|e| e == "bin")).collect();
        files.sort();
        files.iter().map(|path| Self::read(path).expect("a file of benches/kernel_data.py")).collect()
    }

    /// Random words over two vocabularies of 100,000 words that share all but `own` of them. Of 100 words of the text,
    /// `split` have several tokens on one side or on both: each cut at random places on each side.
    pub fn synthetic(name: &str, words: usize, split: u64) -> Self {
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut vocabulary: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
        let mut known: std::collections::HashMap<Vec<u8>, u32> =
            vocabulary.iter().enumerate().map(|(id, token)| (token.clone(), id as u32)).collect();
        while vocabulary.len() < 100_000 {
            let len = 2 + (random.below(4) + random.below(4) + random.below(3)) as usize;
            let word: Vec<u8> = (0..len).map(|k| if k == 0 { b' ' } else { b'a' + random.below(26) as u8 }).collect();
            known.entry(word).or_insert_with_key(|word| {
                vocabulary.push(word.clone());
                vocabulary.len() as u32 - 1
            });
        }
        // Ids in the order of their frequency, as byte pair encodings have them: near enough to Zipf's law.
        let frequent = |random: &mut Random| {
            let top = 1u64 << (8 + random.below(9));
            (256 + random.below(top.min(vocabulary.len() as u64 - 256))) as usize
        };
        let mut sides = [vec![], vec![]];
        for _ in 0..words {
            let word = frequent(&mut random);
            if random.below(100) >= split {
                sides[0].push(word as u32);
                sides[1].push(word as u32);
                continue;
            }
            for ids in &mut sides {
                let mut rest = vocabulary[word].as_slice();
                while !rest.is_empty() {
                    let longest = 1 + random.below(rest.len().min(4) as u64) as usize;
                    let (len, id) =
                        (1..=longest).rev().find_map(|len| Some((len, *known.get(&rest[..len])?))).expect("bytes");
                    ids.push(id);
                    rest = &rest[len..];
                }
            }
        }
        let table = || ByteTable::from_tokens(vocabulary.iter().map(Some)).expect("a small vocabulary");
        Self::new(name.to_owned(), [table(), table()], sides)
    }

    /// Rows of about `tokens` student tokens, cut where chunks end; about `total` tokens in all.
    pub fn rows(&self, tokens: usize, total: usize) -> Batch<'_> {
        let (mut student_cu, mut teacher_cu) = (vec![0], vec![0]);
        let starts = &self.whole.student_ptr;
        loop {
            let from = student_cu[student_cu.len() - 1];
            let to = starts.partition_point(|&start| i64::from(start) < from + tokens as i64);
            if to >= starts.len() || starts[to] as usize > total + total / 50 {
                break;
            }
            student_cu.push(i64::from(starts[to]));
            teacher_cu.push(i64::from(self.whole.teacher_ptr[to]));
        }
        let last = |cu: &[i64]| cu[cu.len() - 1] as usize;
        let (student, teacher) = (&self.student[..last(&student_cu)], &self.teacher[..last(&teacher_cu)]);
        assert!(student_cu.len() > 1, "{}: fewer than {tokens} tokens", self.name);
        Batch { pair: self, student, teacher, student_cu, teacher_cu }
    }

    /// Share of the student tokens in chunks of one token on either side.
    pub fn one_to_one(&self) -> f64 {
        let pairs = self.whole.kind.iter().filter(|&&kind| kind == Kind::OneToOne).count();
        pairs as f64 / self.student.len() as f64
    }
}

impl Batch<'_> {
    /// Aligns all rows in the memory of an earlier batch.
    pub fn align(&self, into: &mut xtokmap::Batch) {
        let rows = |ids, cu| Rows::new(Ids::U32(ids), Layout::Ragged(cu)).expect("rows that fit");
        let (student, teacher) = (rows(self.student, &self.student_cu), rows(self.teacher, &self.teacher_cu));
        self.pair.aligner.align_batch_into(student, teacher, true, into).expect("rows that spell the same bytes");
    }

    /// The floor: no aligner can do with less than reading the length of every token of both sides.
    pub fn lengths(&self) -> u64 {
        let sum = |ids: &[u32], lengths: &[u32]| ids.iter().map(|&id| u64::from(lengths[id as usize])).sum::<u64>();
        sum(self.student, &self.pair.student_lengths) + sum(self.teacher, &self.pair.teacher_lengths)
    }

    pub fn len(&self) -> usize {
        self.student_cu.len() - 1
    }
}

/// xorshift64*: the same on every machine.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
    }
}
