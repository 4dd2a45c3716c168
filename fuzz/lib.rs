//! What the fuzz targets share: a reader of the fuzzer's bytes, and the laws of the crate docs as checks.

use std::collections::HashMap;

use xtokmap::{Aligner, Alignment, ByteTable, Invalid, Kind};

/// Reads the fuzzer's bytes from the front; zeros after their end.
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn byte(&mut self) -> u8 {
        let (&first, rest) = self.0.split_first().unwrap_or((&0, &[]));
        self.0 = rest;
        first
    }

    pub fn number(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// At most `n` bytes.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        taken
    }

    pub fn invalid(&mut self) -> Invalid {
        [Invalid::Maximal, Invalid::Each][usize::from(self.byte() % 2)]
    }
}

/// A token as a test sees it: its bytes; none and no stop is a special token.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    pub bytes: Vec<u8>,
    pub stop: bool,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.stop {
            true => f.write_str("stop"),
            false if self.bytes.is_empty() => f.write_str("None"),
            false => write!(f, "b\"{}\"", self.bytes.escape_ascii()),
        }
    }
}

/// Cuts a text into tokens: every number is the length of the next one, 0 a special token; the rest is one token.
pub fn cut(text: &[u8], lengths: &[u8]) -> Vec<Token> {
    let mut tokens = vec![];
    let mut rest = text;
    for &length in lengths {
        let (bytes, tail) = rest.split_at(usize::from(length % 16).min(rest.len()));
        tokens.push(Token { bytes: bytes.to_vec(), stop: false });
        rest = tail;
    }
    if !rest.is_empty() {
        tokens.push(Token { bytes: rest.to_vec(), stop: false });
    }
    tokens
}

/// A table that holds exactly these tokens, and their ids: 0 is a stop token and 1 a special one.
pub fn table(tokens: &[Token], invalid: Invalid) -> (ByteTable, Vec<u32>) {
    let mut vocabulary: Vec<Option<&[u8]>> = vec![None, None];
    let mut known = HashMap::new();
    let ids = tokens.iter().map(|token| match token {
        Token { stop: true, .. } => 0,
        Token { bytes, .. } if bytes.is_empty() => 1,
        Token { bytes, .. } => *known.entry(bytes).or_insert_with(|| {
            vocabulary.push(Some(bytes));
            vocabulary.len() as u32 - 1
        }),
    });
    let ids = ids.collect();
    (ByteTable::from_tokens(vocabulary).unwrap().with_stop_ids(vec![0]).unwrap().with_invalid(invalid), ids)
}

/// Aligns two lists of tokens, both ways, and checks everything that must hold of any alignment. With `SHOW` set in the
/// environment the tokens are printed first: `SHOW=1 cargo fuzz run align fuzz/artifacts/align/...`.
pub fn aligned(student: &[Token], teacher: &[Token], invalid: [Invalid; 2]) -> Alignment {
    if std::env::var_os("SHOW").is_some() {
        eprintln!("student {student:?}\nteacher {teacher:?}\ninvalid {invalid:?}");
    }
    let ((s, student_ids), (t, teacher_ids)) = (table(student, invalid[0]), table(teacher, invalid[1]));
    let forth = Aligner::new(s.clone(), t.clone()).unwrap().align(&student_ids, &teacher_ids).unwrap();
    let back = Aligner::new(t, s).unwrap().align(&teacher_ids, &student_ids).unwrap();
    check(&forth, student, teacher);
    check(&back, teacher, student);
    check_symmetry(&forth, &back);
    forth
}

pub fn spelled(tokens: &[Token]) -> Vec<u8> {
    tokens.iter().flat_map(|token| &token.bytes).copied().collect()
}

/// Byte end of every token.
pub fn ends(tokens: &[Token]) -> Vec<i32> {
    tokens
        .iter()
        .scan(0, |end, token| {
            *end += token.bytes.len() as i32;
            Some(*end)
        })
        .collect()
}

/// Chunks in order, no token twice or left out, equal bytes where the kind says so, places inside the right token.
pub fn check(a: &Alignment, student: &[Token], teacher: &[Token]) {
    a.check().unwrap();
    let sides = [
        (&a.student_ptr, &a.student_chunk, &a.student_end, student),
        (&a.teacher_ptr, &a.teacher_chunk, &a.teacher_end, teacher),
    ];
    for (ptr, chunk, end, tokens) in sides {
        assert_eq!(chunk.len(), tokens.len());
        assert_eq!(*end, ends(tokens));
        let members: Vec<i32> = chunk.iter().copied().filter(|&g| g >= 0).collect();
        assert!(members.windows(2).all(|w| w[0] <= w[1]));
        for (i, &g) in chunk.iter().enumerate().filter(|(_, &g)| g >= 0) {
            assert!((ptr[g as usize]..ptr[g as usize + 1]).contains(&(i as i32)));
            assert_eq!(a.kind[g as usize] == Kind::Stop, tokens[i].stop);
            assert!(tokens[i].stop || !tokens[i].bytes.is_empty());
        }
        for i in ptr[0] as usize..ptr[a.kind.len()] as usize {
            assert!(chunk[i] >= 0 || tokens[i].bytes.is_empty(), "token {i} is left out inside the aligned region");
        }
    }
    for g in 0..a.kind.len() {
        let students = spelled(&student[a.student_ptr[g] as usize..a.student_ptr[g + 1] as usize]);
        let teachers = spelled(&teacher[a.teacher_ptr[g] as usize..a.teacher_ptr[g + 1] as usize]);
        let count = |chunk: &[i32]| chunk.iter().filter(|&&c| c == g as i32).count();
        let counts = (count(&a.student_chunk), count(&a.teacher_chunk));
        match a.kind[g] {
            Kind::Rewritten => assert_ne!(students, teachers, "chunk {g}"),
            kind => {
                assert_eq!(students, teachers, "chunk {g}");
                let expected = match counts {
                    (1, 1) if students.is_empty() => Kind::Stop,
                    (1, 1) => Kind::OneToOne,
                    (1, n) if n > 1 => Kind::OneToMany,
                    (m, 1) if m > 1 => Kind::ManyToOne,
                    (m, n) if m > 1 && n > 1 => Kind::ManyToMany,
                    _ => panic!("chunk {g} has {counts:?} tokens"),
                };
                assert_eq!(kind, expected, "chunk {g}");
            }
        }
    }
    for i in 0..student.len() {
        assert_eq!(a.teacher_pos[i] < 0, a.teacher_off[i] < 0);
        if a.teacher_pos[i] < 0 {
            continue;
        }
        let (j, off) = (a.teacher_pos[i] as usize, a.teacher_off[i] as usize);
        assert!(a.student_chunk[i] >= 0, "a token that is unaligned has a place");
        assert_eq!(a.student_chunk[i], a.teacher_chunk[j]);
        if !matches!(a.kind[a.student_chunk[i] as usize], Kind::Rewritten | Kind::Stop) {
            let (own, rest) = (&student[i].bytes, &teacher[j].bytes[off..]);
            let both = own.len().min(rest.len());
            assert!(both > 0);
            assert_eq!(own[..both], rest[..both]);
        }
    }
}

/// Law 4: the sides can be swapped.
pub fn check_symmetry(forth: &Alignment, back: &Alignment) {
    let mirrored = |kind: &Kind| match kind {
        Kind::OneToMany => Kind::ManyToOne,
        Kind::ManyToOne => Kind::OneToMany,
        kind => *kind,
    };
    assert_eq!(forth.kind, back.kind.iter().map(mirrored).collect::<Vec<_>>());
    assert_eq!((&forth.student_ptr, &forth.teacher_ptr), (&back.teacher_ptr, &back.student_ptr));
    assert_eq!((&forth.student_chunk, &forth.teacher_chunk), (&back.teacher_chunk, &back.student_chunk));
    assert_eq!((&forth.student_end, &forth.teacher_end), (&back.teacher_end, &back.student_end));
}
