//! The laws of the crate docs as properties, against a brute-force oracle.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::ref_option, clippy::type_complexity)]
#![allow(clippy::unnecessary_wraps)]

use proptest::prelude::*;
use xtokmap::{align_offsets, align_texts, map_spans, overlaps, Side, SpanMode};
use xtokmap::{Aligner, Alignment, ByteTable, Error, Ids, Invalid, Kind, Layout, Role, Rows};

type Tokens = Vec<Option<Vec<u8>>>;

/// Stop tokens are spelled like this in a test's token lists; they become special ids with a stop role.
fn stop() -> Option<Vec<u8>> {
    Some(b"<stop>".to_vec())
}

/// A table that holds exactly these tokens, and their ids: the first id is a stop token, equal tokens share an id.
fn table(tokens: &Tokens) -> (ByteTable, Vec<u32>) {
    let mut vocabulary: Tokens = vec![None, None];
    let mut ids = vec![];
    for token in tokens {
        let id = match token {
            None => 1,
            Some(_) if *token == stop() => 0,
            Some(_) => vocabulary.iter().position(|v| v == token).unwrap_or(vocabulary.len()),
        };
        if id == vocabulary.len() {
            vocabulary.push(token.clone());
        }
        ids.push(id as u32);
    }
    (ByteTable::from_tokens(vocabulary).unwrap().with_stop_ids(vec![0]).unwrap(), ids)
}

fn some(text: &str) -> Option<Vec<u8>> {
    Some(text.as_bytes().to_vec())
}

fn align(student: &Tokens, teacher: &Tokens) -> Alignment {
    let ((s, student), (t, teacher)) = (table(student), table(teacher));
    Aligner::new(s, t).unwrap().align(&student, &teacher).unwrap()
}

fn has_bytes(token: &Option<Vec<u8>>) -> bool {
    token.as_ref().is_some_and(|b| !b.is_empty()) && *token != stop()
}

fn spelled(tokens: &[Option<Vec<u8>>]) -> Vec<u8> {
    tokens.iter().filter(|t| has_bytes(t)).flat_map(|t| t.clone().unwrap()).collect()
}

/// A text on both sides, in pieces that correspond: equal ones, and ones that are spelled differently.
type Pieces = Vec<(Vec<u8>, Vec<u8>)>;

/// A chunk as (student tokens, teacher tokens, kind).
type Spans = Vec<(Vec<usize>, Vec<usize>, Kind)>;

/// The oracle: cut wherever a token ends on both sides at the same place of the text. Inside a piece that differs
/// there is no such place; inside an equal one every byte is.
fn oracle(pieces: &Pieces, student: &Tokens, teacher: &Tokens) -> Spans {
    let mut places = vec![(0, 0)];
    let mut changed = vec![];
    let (mut x, mut y) = (0, 0);
    for (s, t) in pieces {
        if s == t {
            places.extend((1..=s.len()).map(|k| (x + k, y + k)));
        } else {
            places.push((x + s.len(), y + t.len()));
            changed.push((x + s.len(), y + t.len()));
        }
        (x, y) = (x + s.len(), y + t.len());
    }
    let ends = |tokens: &Tokens| -> Vec<usize> {
        let mut end = 0;
        tokens
            .iter()
            .map(|t| {
                end += if has_bytes(t) { t.as_ref().unwrap().len() } else { 0 };
                end
            })
            .collect()
    };
    let (student_ends, teacher_ends) = (ends(student), ends(teacher));
    let is_end = |ends: &[usize], at: usize| at == 0 || ends.contains(&at);
    let cuts: Vec<(usize, usize)> =
        places.into_iter().filter(|&(x, y)| is_end(&student_ends, x) && is_end(&teacher_ends, y)).collect();
    let within = |tokens: &Tokens, ends: &[usize], from: usize, to: usize| -> Vec<usize> {
        (0..tokens.len()).filter(|&i| has_bytes(&tokens[i]) && from < ends[i] && ends[i] <= to).collect()
    };
    let mut spans = vec![];
    for w in cuts.windows(2) {
        let s = within(student, &student_ends, w[0].0, w[1].0);
        let t = within(teacher, &teacher_ends, w[0].1, w[1].1);
        let rewritten = changed.iter().any(|c| w[0] < *c && *c <= w[1]);
        let kind = match (s.len(), t.len()) {
            _ if rewritten => Kind::Rewritten,
            (1, 1) => Kind::OneToOne,
            (1, _) => Kind::OneToMany,
            (_, 1) => Kind::ManyToOne,
            _ => Kind::ManyToMany,
        };
        spans.push((s, t, kind));
    }
    spans
}

/// What an alignment says, in the oracle's form; STOP chunks are left out.
fn spans(a: &Alignment) -> Spans {
    let members = |chunk: &[i32], g: usize| (0..chunk.len()).filter(|&i| chunk[i] == g as i32).collect::<Vec<_>>();
    (0..a.kind.len())
        .filter(|&g| a.kind[g] != Kind::Stop)
        .map(|g| (members(&a.student_chunk, g), members(&a.teacher_chunk, g), a.kind[g]))
        .collect()
}

/// Cuts bytes into tokens at these places (any number, modulo the length), specials and stops thrown in.
fn cut(text: &[u8], places: &[(u16, u8)]) -> Tokens {
    let mut at: Vec<(usize, u8)> = places.iter().map(|&(p, what)| (p as usize % (text.len() + 1), what)).collect();
    at.sort_unstable();
    let mut tokens = vec![];
    let mut from = 0;
    for (place, what) in at {
        if place > from {
            tokens.push(Some(text[from..place].to_vec()));
            from = place;
        }
        if what == 0 {
            tokens.push(None);
        }
    }
    if from < text.len() {
        tokens.push(Some(text[from..].to_vec()));
    }
    tokens
}

fn places() -> impl Strategy<Value = Vec<(u16, u8)>> {
    prop::collection::vec((any::<u16>(), 0u8..8), 0..24)
}

/// Bytes over a small alphabet, in which whole and broken characters are common.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop::sample::select(vec![b'a', b'b', b' ', 0xC3, 0xA9, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0x92, 0xFF]);
    prop::collection::vec(byte, 0..40)
}

/// Pairs that normalizers and lossy decodes make of a character, and characters that they leave alone.
fn pieces() -> impl Strategy<Value = Pieces> {
    let changed: Vec<(&[u8], &[u8])> = vec![
        ("É".as_bytes(), "é".as_bytes()),
        ("e\u{301}".as_bytes(), "é".as_bytes()),
        ("\u{958}".as_bytes(), "क\u{93c}".as_bytes()),
        ("\u{1112}\u{1161}\u{11ab}".as_bytes(), "한".as_bytes()),
        ("\u{fb1d}".as_bytes(), "\u{5d9}\u{5b4}".as_bytes()),
        ("ﬁ".as_bytes(), b"fi"),
        ("Ａ".as_bytes(), b"A"),
        ("½".as_bytes(), "1\u{2044}2".as_bytes()),
        (b"Q", b"q"),
        ("▁".as_bytes(), b" "),
        (b"\xe4\xbd", "\u{fffd}".as_bytes()),
        (b"\xff", "\u{fffd}".as_bytes()),
        (b"\xf0\x9f\x92", "\u{fffd}".as_bytes()),
    ];
    let same: Vec<&[u8]> = ["x", "y", "z", "-", "é", "漢", "字", "💡", "ж", "0"].iter().map(|s| s.as_bytes()).collect();
    let piece = prop_oneof![
        5 => prop::sample::select(same).prop_map(|s| (s.to_vec(), s.to_vec())),
        1 => prop::sample::select(changed).prop_map(|(s, t)| (s.to_vec(), t.to_vec())),
    ];
    prop::collection::vec(piece, 0..24)
}

fn swapped(a: &Alignment) -> Alignment {
    let kind = a.kind.iter().map(|k| match k {
        Kind::OneToMany => Kind::ManyToOne,
        Kind::ManyToOne => Kind::OneToMany,
        k => *k,
    });
    Alignment {
        student_ptr: a.teacher_ptr.clone(),
        teacher_ptr: a.student_ptr.clone(),
        kind: kind.collect(),
        student_chunk: a.teacher_chunk.clone(),
        teacher_chunk: a.student_chunk.clone(),
        student_end: a.teacher_end.clone(),
        teacher_end: a.student_end.clone(),
        teacher_pos: vec![],
        teacher_off: vec![],
        starts: None,
    }
}

fn unplaced(a: Alignment) -> Alignment {
    Alignment { teacher_pos: vec![], teacher_off: vec![], ..a }
}

/// What must hold of any alignment: chunks in order, nothing twice, equal bytes where the kind says so.
fn check_shape(a: &Alignment, student: &Tokens, teacher: &Tokens) {
    assert_eq!(a.student_ptr.len(), a.kind.len() + 1);
    assert_eq!(a.teacher_ptr.len(), a.kind.len() + 1);
    for (ptr, chunk, tokens) in
        [(&a.student_ptr, &a.student_chunk, student), (&a.teacher_ptr, &a.teacher_chunk, teacher)]
    {
        assert!(ptr.windows(2).all(|w| w[0] <= w[1]));
        assert_eq!(chunk.len(), tokens.len());
        let aligned: Vec<i32> = chunk.iter().copied().filter(|&g| g >= 0).collect();
        assert!(aligned.windows(2).all(|w| w[0] <= w[1]));
        for (i, &g) in chunk.iter().enumerate().filter(|(_, &g)| g >= 0) {
            let span = ptr[g as usize]..ptr[g as usize + 1];
            assert!(span.contains(&(i as i32)));
            assert_eq!(a.kind[g as usize] == Kind::Stop, tokens[i] == stop());
        }
        // Inside the aligned region every token with bytes is in a chunk.
        let region = ptr[0] as usize..ptr[a.kind.len()] as usize;
        for i in region {
            assert!(chunk[i] >= 0 || !has_bytes(&tokens[i]));
        }
    }
    for g in 0..a.kind.len() {
        let students = spelled(&student[a.student_ptr[g] as usize..a.student_ptr[g + 1] as usize]);
        let teachers = spelled(&teacher[a.teacher_ptr[g] as usize..a.teacher_ptr[g + 1] as usize]);
        match a.kind[g] {
            Kind::Rewritten => assert_ne!(students, teachers),
            Kind::Stop => assert!(students.is_empty() && teachers.is_empty()),
            _ => assert_eq!(students, teachers),
        }
    }
    for i in (0..student.len()).filter(|&i| a.teacher_pos[i] >= 0) {
        let (j, off) = (a.teacher_pos[i] as usize, a.teacher_off[i]);
        assert_eq!(a.student_chunk[i], a.teacher_chunk[j]);
        if a.kind[a.student_chunk[i] as usize] != Kind::Rewritten && has_bytes(&student[i]) {
            let rest = &teacher[j].as_ref().unwrap()[off as usize..];
            let both = rest.len().min(student[i].as_ref().unwrap().len());
            assert_eq!(rest[..both], student[i].as_ref().unwrap()[..both]);
        }
    }
}

/// The merge in its readable form, for sides that spell the same bytes and end their turns at the same places: of two
/// pointers, the one whose token ends first moves on.
fn two_pointers(student: &Tokens, teacher: &Tokens) -> Alignment {
    let len = |token: &Option<Vec<u8>>| if has_bytes(token) { token.as_ref().unwrap().len() } else { 0 };
    let ends = |tokens: &Tokens| -> Vec<i32> {
        tokens
            .iter()
            .scan(0, |end, token| {
                *end += len(token) as i32;
                Some(*end)
            })
            .collect()
    };
    let (m, n) = (student.len(), teacher.len());
    let mut a = Alignment {
        student_chunk: vec![-1; m],
        teacher_chunk: vec![-1; n],
        student_end: ends(student),
        teacher_end: ends(teacher),
        teacher_pos: vec![-1; m],
        teacher_off: vec![-1; m],
        ..Alignment::default()
    };
    let (mut i, mut j) = (0, 0);
    let mut last = (0, 0);
    while i < m || j < n {
        let (from_i, from_j) = (i, j);
        let run = |tokens: &Tokens, from: usize| from + tokens[from..].iter().take_while(|t| !has_bytes(t)).count();
        (i, j) = (run(student, i), run(teacher, j));
        if (i, j) != (from_i, from_j) {
            let found = |tokens: &Tokens, from: usize, to: usize| (from..to).find(|&k| tokens[k] == stop());
            if let (Some(s), Some(t)) = (found(student, from_i, i), found(teacher, from_j, j)) {
                let g = a.kind.len() as i32;
                (a.student_chunk[s], a.teacher_chunk[t]) = (g, g);
                (a.teacher_pos[s], a.teacher_off[s]) = (t as i32, 0);
                a.student_ptr.push(s as i32);
                a.teacher_ptr.push(t as i32);
                a.kind.push(Kind::Stop);
                last = (s + 1, t + 1);
            }
            continue;
        }
        let g = a.kind.len() as i32;
        a.student_ptr.push(i as i32);
        a.teacher_ptr.push(j as i32);
        let (mut students, mut teachers) = (0, 0);
        loop {
            // Tokens without bytes inside a chunk belong to no chunk.
            (i, j) = (run(student, i), run(teacher, j));
            let (x, y) = (a.student_end[i], a.teacher_end[j]);
            if a.student_chunk[i] < 0 {
                a.student_chunk[i] = g;
                (a.teacher_pos[i], a.teacher_off[i]) =
                    (j as i32, x - len(&student[i]) as i32 - (y - len(&teacher[j]) as i32));
                students += 1;
            }
            if a.teacher_chunk[j] < 0 {
                a.teacher_chunk[j] = g;
                teachers += 1;
            }
            (i, j) = (i + usize::from(x <= y), j + usize::from(y <= x));
            if x == y {
                break;
            }
        }
        a.kind.push(match (students, teachers) {
            (1, 1) => Kind::OneToOne,
            (1, _) => Kind::OneToMany,
            (_, 1) => Kind::ManyToOne,
            _ => Kind::ManyToMany,
        });
        last = (i, j);
    }
    a.student_ptr.push(last.0 as i32);
    a.teacher_ptr.push(last.1 as i32);
    a
}

/// Words of one to 600 bytes, cut into tokens on either side: long runs of equal tokens, pairs, and everything else.
fn words() -> impl Strategy<Value = (Tokens, Tokens)> {
    let len = prop_oneof![8 => 1usize..9, 4 => 9usize..40, 1 => prop::sample::select(vec![510usize, 511, 512, 600])];
    let cuts = || prop::collection::vec(any::<u16>(), 0..4);
    let word = prop_oneof![
        6 => Just((vec![], vec![])),
        1 => (cuts(), Just(vec![])),
        1 => (Just(vec![]), cuts()),
        1 => (cuts(), cuts()),
    ];
    let between = prop::sample::select(vec![0u8, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4]);
    prop::collection::vec((len, any::<u8>(), word, between), 0..60).prop_map(|words| {
        let (mut student, mut teacher): (Tokens, Tokens) = (vec![], vec![]);
        for (len, seed, (a, b), between) in words {
            let word: Vec<u8> = (0..len).map(|k| b'a' + (usize::from(seed) + k * k) as u8 % 7).collect();
            let cut = |at: &[u16]| cut(&word, &at.iter().map(|&p| (p, 1)).collect::<Vec<_>>());
            student.extend(cut(&a));
            teacher.extend(cut(&b));
            match between {
                1 => student.push(None),
                2 => teacher.push(None),
                3 => {
                    student.extend([stop(), None]);
                    teacher.extend([None, stop(), stop()]);
                }
                4 => {
                    student.push(stop());
                    teacher.push(stop());
                }
                _ => {}
            }
        }
        (student, teacher)
    })
}

/// Ids of one type, in rows with a mask: padded on the left, on the right, or with holes.
fn padded(ids: &[u32], cu: &[i64], how: u8) -> (Vec<i64>, Vec<bool>, usize) {
    let rows: Vec<&[u32]> = cu.windows(2).map(|w| &ids[w[0] as usize..w[1] as usize]).collect();
    let width = 2 * rows.iter().map(|row| row.len()).max().unwrap_or(0) + 1;
    let (mut ids, mut mask) = (vec![0; width * rows.len()], vec![false; width * rows.len()]);
    for (b, row) in rows.iter().enumerate() {
        for (k, &id) in row.iter().enumerate() {
            let at = b * width
                + match how {
                    0 => k,
                    1 => width - row.len() + k,
                    _ => 2 * k,
                };
            (ids[at], mask[at]) = (i64::from(id), true);
        }
    }
    (ids, mask, width)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equal_bytes_give_the_oracle_chunks(text in bytes(), a in places(), b in places()) {
        let (student, teacher) = (cut(&text, &a), cut(&text, &b));
        let alignment = align(&student, &teacher);
        check_shape(&alignment, &student, &teacher);
        prop_assert_eq!(spans(&alignment), oracle(&vec![(text.clone(), text)], &student, &teacher));
    }

    #[test]
    fn changed_characters_cost_only_themselves(pieces in pieces(), a in places(), b in places()) {
        let text = |side: fn(&(Vec<u8>, Vec<u8>)) -> &Vec<u8>| pieces.iter().flat_map(side).copied().collect::<Vec<u8>>();
        let (student, teacher) = (cut(&text(|p| &p.0), &a), cut(&text(|p| &p.1), &b));
        let alignment = align(&student, &teacher);
        check_shape(&alignment, &student, &teacher);
        prop_assert_eq!(spans(&alignment), oracle(&pieces, &student, &teacher));
    }

    #[test]
    fn sides_are_symmetric(x in bytes(), y in bytes(), same in any::<bool>(), a in places(), b in places()) {
        let (student, teacher) = (cut(&x, &a), cut(if same { &x } else { &y }, &b));
        let (forth, back) = (align(&student, &teacher), align(&teacher, &student));
        check_shape(&forth, &student, &teacher);
        prop_assert_eq!(unplaced(forth), swapped(&back));
    }

    #[test]
    fn a_side_aligned_to_itself_is_one_to_one(text in bytes(), a in places()) {
        let student = cut(&text, &a);
        let alignment = align(&student, &student);
        prop_assert!(alignment.kind.iter().all(|&k| k == Kind::OneToOne));
        prop_assert_eq!(alignment.kind.len(), student.iter().filter(|t| has_bytes(t)).count());
    }

    #[test]
    fn an_edit_costs_its_neighbourhood(
        before in "[a-z ]{40,80}", after in "[a-z ]{40,80}", out in "[a-z]{0,12}", put in "[0-9]{0,12}",
        a in places(), b in places(),
    ) {
        prop_assume!(!out.is_empty() || !put.is_empty());
        // A rare frame keeps the edit's place from being ambiguous.
        let (x, y) = (format!("{before}#{out}#{after}"), format!("{before}#{put}#{after}"));
        let (student, teacher) = (cut(x.as_bytes(), &a), cut(y.as_bytes(), &b));
        let alignment = align(&student, &teacher);
        check_shape(&alignment, &student, &teacher);
        let pieces: Pieces = vec![
            (format!("{before}#").into_bytes(), format!("{before}#").into_bytes()),
            (out.into_bytes(), put.into_bytes()),
            (format!("#{after}").into_bytes(), format!("#{after}").into_bytes()),
        ];
        prop_assert_eq!(spans(&alignment), oracle(&pieces, &student, &teacher));
    }

    #[test]
    fn cutting_the_end_changes_only_the_last_chunk(text in bytes(), a in places(), b in places(), keep in any::<u16>()) {
        let (student, teacher) = (cut(&text, &a), cut(&text, &b));
        let whole = align(&student, &teacher);
        let kept: Tokens = student[..keep as usize % (student.len() + 1)].to_vec();
        let part = align(&kept, &teacher);
        check_shape(&part, &kept, &teacher);
        let (part, whole) = (spans(&part), spans(&whole));
        prop_assert!(part.len() <= whole.len());
        prop_assert_eq!(&part[..], &whole[..part.len()]);
        let aligned = part.iter().map(|c| c.0.len()).sum::<usize>();
        let complete = whole.iter().take_while(|c| c.0.iter().all(|&i| i < kept.len())).count();
        prop_assert_eq!(part.len(), complete);
        prop_assert!(aligned <= kept.len());
    }

    #[test]
    fn a_batch_is_its_rows(
        rows in prop::collection::vec((bytes(), places(), places()), 0..6), threads in 1usize..4, left in any::<bool>(),
    ) {
        let sides: Vec<(Tokens, Tokens)> = rows.iter().map(|(t, a, b)| (cut(t, a), cut(t, b))).collect();
        let all = |side: fn(&(Tokens, Tokens)) -> &Tokens| table(&sides.iter().flat_map(side).cloned().collect());
        let ((s, student), (t, teacher)) = (all(|r| &r.0), all(|r| &r.1));
        let cu = |side: fn(&(Tokens, Tokens)) -> &Tokens| {
            let mut cu = vec![0i64];
            cu.extend(sides.iter().scan(0, |n, r| { *n += side(r).len() as i64; Some(*n) }));
            cu
        };
        let (student_cu, teacher_cu) = (cu(|r| &r.0), cu(|r| &r.1));
        let aligner = Aligner::new(s, t).unwrap();
        let ragged = |ids, cu| Rows::new(Ids::U32(ids), Layout::Ragged(cu)).unwrap();
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let batch = pool.install(|| {
            aligner.align_batch(ragged(&student, &student_cu), ragged(&teacher, &teacher_cu), false).unwrap()
        });

        // Padded, on either side, with ids that no vocabulary has.
        let width = sides.iter().map(|r| r.0.len()).max().unwrap_or(0) + 1;
        let (mut ids, mut mask) = (vec![-100i64; width * sides.len()], vec![false; width * sides.len()]);
        for b in 0..sides.len() {
            let row = &student[student_cu[b] as usize..student_cu[b + 1] as usize];
            let from = b * width + if left { width - row.len() } else { 0 };
            for (k, &id) in row.iter().enumerate() {
                (ids[from + k], mask[from + k]) = (i64::from(id), true);
            }
        }
        let padded = Rows::new(Ids::I64(&ids), Layout::Padded { width, mask: &mask }).unwrap();
        prop_assert_eq!(&aligner.align_batch(padded, ragged(&teacher, &teacher_cu), false).unwrap(), &batch);

        for b in 0..sides.len() {
            let row = |ids: &[u32], cu: &[i64]| ids[cu[b] as usize..cu[b + 1] as usize].to_vec();
            let alone = aligner.align(&row(&student, &student_cu), &row(&teacher, &teacher_cu)).unwrap();
            let chunks = batch.chunk_cu[b] as usize..batch.chunk_cu[b + 1] as usize;
            let (m, n) = (student_cu[b] as usize..student_cu[b + 1] as usize, teacher_cu[b] as usize..teacher_cu[b + 1] as usize);
            let flat = &batch.flat;
            prop_assert_eq!(&flat.kind[chunks.clone()], &alone.kind[..]);
            prop_assert_eq!(&flat.student_ptr[chunks.start + b..=chunks.end + b], &alone.student_ptr[..]);
            prop_assert_eq!(&flat.teacher_ptr[chunks.start + b..=chunks.end + b], &alone.teacher_ptr[..]);
            prop_assert_eq!(&flat.student_chunk[m.clone()], &alone.student_chunk[..]);
            prop_assert_eq!(&flat.student_end[m.clone()], &alone.student_end[..]);
            prop_assert_eq!(&flat.teacher_pos[m.clone()], &alone.teacher_pos[..]);
            prop_assert_eq!(&flat.teacher_off[m], &alone.teacher_off[..]);
            prop_assert_eq!(&flat.teacher_chunk[n.clone()], &alone.teacher_chunk[..]);
            prop_assert_eq!(&flat.teacher_end[n], &alone.teacher_end[..]);
        }
    }

    #[test]
    fn the_merge_is_two_pointers_whatever_holds_the_ids(
        rows in prop::collection::vec(words(), 1..4), how in 0u8..3, parallel in any::<bool>(),
    ) {
        let all = |side: fn(&(Tokens, Tokens)) -> &Tokens| table(&rows.iter().flat_map(side).cloned().collect());
        let ((s, student), (t, teacher)) = (all(|r| &r.0), all(|r| &r.1));
        let cu = |side: fn(&(Tokens, Tokens)) -> &Tokens| {
            let ends = rows.iter().scan(0, |n, r| { *n += side(r).len() as i64; Some(*n) });
            std::iter::once(0).chain(ends).collect::<Vec<i64>>()
        };
        let (student_cu, teacher_cu) = (cu(|r| &r.0), cu(|r| &r.1));
        let aligner = Aligner::new(s, t).unwrap();

        let mut want = xtokmap::Batch { chunk_cu: vec![0], student_cu, teacher_cu, ..xtokmap::Batch::default() };
        for (student, teacher) in &rows {
            let row = two_pointers(student, teacher);
            want.chunk_cu.push(want.chunk_cu[want.chunk_cu.len() - 1] + row.kind.len() as i64);
            let flat = &mut want.flat;
            flat.kind.extend(row.kind);
            for (all, row) in [
                (&mut flat.student_ptr, row.student_ptr), (&mut flat.teacher_ptr, row.teacher_ptr),
                (&mut flat.student_chunk, row.student_chunk), (&mut flat.teacher_chunk, row.teacher_chunk),
                (&mut flat.student_end, row.student_end), (&mut flat.teacher_end, row.teacher_end),
                (&mut flat.teacher_pos, row.teacher_pos), (&mut flat.teacher_off, row.teacher_off),
            ] {
                all.extend(row);
            }
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1 + usize::from(parallel)).build().unwrap();
        // All in the same memory, which holds another batch in between.
        let mut batch = xtokmap::Batch::default();
        let (student_cu, teacher_cu) = (&want.student_cu, &want.teacher_cu);
        let (s_pad, s_mask, s_width) = padded(&student, student_cu, how);
        let (t_pad, t_mask, t_width) = padded(&teacher, teacher_cu, 2 - how);
        macro_rules! check {
            ($s:ident $s_type:ty, $t:ident $t_type:ty) => {
                let (a, b): (Vec<$s_type>, Vec<$t_type>) =
                    (student.iter().map(|&id| id.try_into().unwrap()).collect(), teacher.iter().map(|&id| id.try_into().unwrap()).collect());
                let ragged = |ids, cu| Rows::new(ids, Layout::Ragged(cu)).unwrap();
                let (x, y) = (ragged(Ids::$s(&a), student_cu), ragged(Ids::$t(&b), teacher_cu));
                let turned = Aligner::new(aligner.teacher().clone(), aligner.student().clone()).unwrap();
                pool.install(|| turned.align_batch_into(y, x, true, &mut batch)).unwrap();
                pool.install(|| aligner.align_batch_into(x, y, true, &mut batch)).unwrap();
                prop_assert_eq!(&batch, &want);
                let (a, b): (Vec<$s_type>, Vec<$t_type>) =
                    (s_pad.iter().map(|&id| id.try_into().unwrap()).collect(), t_pad.iter().map(|&id| id.try_into().unwrap()).collect());
                let x = Rows::new(Ids::$s(&a), Layout::Padded { width: s_width, mask: &s_mask }).unwrap();
                let y = Rows::new(Ids::$t(&b), Layout::Padded { width: t_width, mask: &t_mask }).unwrap();
                pool.install(|| aligner.align_batch_into(x, y, true, &mut batch)).unwrap();
                prop_assert_eq!(&batch, &want);
            };
        }
        check!(I32 i32, I32 i32);
        check!(I32 i32, I64 i64);
        check!(I64 i64, U32 u32);
        check!(U32 u32, I32 i32);
        check!(I64 i64, I64 i64);
        check!(U32 u32, U32 u32);
    }

    #[test]
    fn strict_refuses_exactly_what_differs(x in bytes(), y in bytes(), same in any::<bool>(), a in places(), b in places()) {
        let y = if same { x.clone() } else { y };
        let ((s, student), (t, teacher)) = (table(&cut(&x, &a)), table(&cut(&y, &b)));
        let (student_cu, teacher_cu) = ([0, student.len() as i64], [0, teacher.len() as i64]);
        let rows = |ids, cu| Rows::new(Ids::U32(ids), Layout::Ragged(cu)).unwrap();
        let result = Aligner::new(s, t).unwrap().align_batch(rows(&student, &student_cu), rows(&teacher, &teacher_cu), true);
        if x == y {
            prop_assert!(result.is_ok());
        } else {
            let common = x.iter().zip(&y).take_while(|(p, q)| p == q).count();
            let Err(Error::ByteMismatch(at)) = result else { panic!("expected a mismatch") };
            prop_assert_eq!(at.byte, common);
        }
    }

    #[test]
    fn random_bytes_never_panic(x in prop::collection::vec(any::<u8>(), 0..300), y in prop::collection::vec(any::<u8>(), 0..300), a in places(), b in places(), each in any::<bool>()) {
        let (x, y) = (cut(&x, &a), cut(&y, &b));
        let ((s, student), (t, teacher)) = (table(&x), table(&y));
        let s = if each { s.with_invalid(Invalid::Each) } else { s };
        let alignment = Aligner::new(s, t).unwrap().align(&student, &teacher).unwrap();
        check_shape(&alignment, &x, &y);
    }

    #[test]
    fn overlaps_share_every_byte_once(text in bytes(), a in places(), b in places()) {
        let (student, teacher) = (cut(&text, &a), cut(&text, &b));
        let alignment = align(&student, &teacher);
        let found = overlaps(&alignment);
        let (mut own, mut other) = (vec![0; student.len()], vec![0; teacher.len()]);
        for (own, entries) in own.iter_mut().zip(found.indptr.windows(2)) {
            for k in entries[0] as usize..entries[1] as usize {
                prop_assert!(found.nbytes[k] > 0);
                *own += found.nbytes[k];
                other[found.indices[k] as usize] += found.nbytes[k];
            }
        }
        let lengths = |side: &Tokens| side.iter().map(|t| t.as_ref().map_or(0, Vec::len) as i32).collect::<Vec<_>>();
        prop_assert_eq!(own, lengths(&student));
        prop_assert_eq!(other, lengths(&teacher));
    }

    #[test]
    fn spans_cover_what_lies_inside(text in bytes(), a in places(), b in places(), from in any::<u16>(), to in any::<u16>()) {
        let (student, teacher) = (cut(&text, &a), cut(&text, &b));
        let alignment = align(&student, &teacher);
        let mut span = [from, to].map(|x| i64::from(x) % (student.len() as i64 + 1));
        span.sort_unstable();
        let map = |mode| map_spans(&alignment, &[span], Side::Teacher, mode).unwrap()[0];
        let (cover, inside) = (map(SpanMode::Cover), map(SpanMode::Inside));
        let words = |side: &Tokens, span: [i64; 2]| match span {
            [-1, -1] => vec![],
            [start, stop] => spelled(&side[start as usize..stop as usize]),
        };
        let said = words(&student, span);
        let holds = |outer: &[u8], inner: &[u8]| inner.is_empty() || outer.windows(inner.len()).any(|w| w == inner);
        prop_assert!(holds(&words(&teacher, cover), &said));
        prop_assert!(holds(&said, &words(&teacher, inside)));
        prop_assert!(inside == [-1, -1] || (cover[0] <= inside[0] && inside[1] <= cover[1]));
        let outside = [[span[0], student.len() as i64 + 1]];
        prop_assert!(map_spans(&alignment, &outside, Side::Teacher, SpanMode::Cover).is_err());
    }

    #[test]
    fn offsets_without_gaps_are_byte_ends(text in bytes(), a in places(), b in places()) {
        let said = |tokens: Tokens| tokens.into_iter().filter(has_bytes).collect::<Tokens>();
        let (student, teacher) = (said(cut(&text, &a)), said(cut(&text, &b)));
        let offsets = |ends: &[i32]| {
            let starts = std::iter::once(0).chain(ends.iter().copied());
            starts.zip(ends).map(|(start, &end)| [i64::from(start), i64::from(end)]).collect::<Vec<_>>()
        };
        let by_bytes = align(&student, &teacher);
        let by_offsets = align_offsets(&offsets(&by_bytes.student_end), &offsets(&by_bytes.teacher_end)).unwrap();
        prop_assert_eq!(overlaps(&by_offsets), overlaps(&by_bytes));
        prop_assert_eq!(Alignment { starts: None, ..by_offsets }, by_bytes);
    }

    #[test]
    fn turns_are_aligned_each_by_itself(turns in prop::collection::vec((bytes(), bytes(), any::<bool>(), places(), places()), 1..4)) {
        let (mut student, mut teacher): (Tokens, Tokens) = (vec![], vec![]);
        let mut alone = vec![];
        for (x, y, same, a, b) in &turns {
            // A turn without text would be one run of end-of-turn tokens with the turn before.
            let said = |text: &Vec<u8>| [b"x".as_slice(), text].concat();
            let (mut s, mut t) = (cut(&said(x), a), cut(&said(if *same { x } else { y }), b));
            s.push(stop());
            t.push(stop());
            let (i, j) = (student.len(), teacher.len());
            let shifted = |(s, t, kind): (Vec<usize>, Vec<usize>, Kind)| {
                (s.iter().map(|k| k + i).collect(), t.iter().map(|k| k + j).collect(), kind)
            };
            let alignment = align(&s, &t);
            // Closed by an end of turn on both sides, nothing is left over.
            for (tokens, chunk) in [(&s, &alignment.student_chunk), (&t, &alignment.teacher_chunk)] {
                prop_assert!(tokens.iter().zip(chunk).all(|(token, &g)| g >= 0 || !has_bytes(token) && *token != stop()));
            }
            alone.extend(spans(&alignment).into_iter().map(shifted));
            student.extend(s);
            teacher.extend(t);
        }
        let alignment = align(&student, &teacher);
        check_shape(&alignment, &student, &teacher);
        prop_assert_eq!(spans(&alignment), alone);
        prop_assert_eq!(alignment.kind.iter().filter(|&&k| k == Kind::Stop).count(), turns.len());
    }

    #[test]
    fn what_lies_between_markers_is_aligned_by_itself(
        parts in prop::collection::vec((bytes(), bytes(), any::<bool>(), places(), places(), 0..5usize), 1..5)
    ) {
        // Markers of one token on one side and of two on the other, spelled as no text is.
        let (one, two) = ([some("<|")], [some("[|"), some("|]")]);
        let role = |k: usize| Role::ALL[k].0;
        let (mut student, mut teacher): (Tokens, Tokens) = (vec![], vec![]);
        let mut alone = vec![];
        for (x, y, same, a, b, _) in &parts {
            let said = |tokens: Tokens| tokens.into_iter().filter(|token| *token != stop()).collect::<Tokens>();
            let (s, t) = (said(cut(x, a)), said(cut(if *same { x } else { y }, b)));
            let (i, j) = (student.len(), teacher.len());
            let shifted = |(s, t, kind): (Vec<usize>, Vec<usize>, Kind)| {
                (s.iter().map(|k| k + i).collect(), t.iter().map(|k| k + j).collect(), kind)
            };
            let closed = |tokens: &Tokens| tokens.iter().cloned().chain([stop()]).collect::<Tokens>();
            alone.extend(spans(&align(&closed(&s), &closed(&t))).into_iter().map(shifted));
            student.extend(s.into_iter().chain(one.clone()));
            teacher.extend(t.into_iter().chain(two.clone()));
        }
        let made = |tokens: &Tokens, marker: &Tokens, kind: usize| {
            let (table, ids) = table(&tokens.iter().chain(marker).cloned().collect());
            let (ids, marker) = ids.split_at(tokens.len());
            (table.with_markers(vec![(role(kind), marker.to_vec())]).unwrap(), ids.to_vec())
        };
        let kind = parts[0].5;
        let ((s, student), (t, teacher)) =
            (made(&student, &one.to_vec(), kind), made(&teacher, &two.to_vec(), kind));
        let forth = Aligner::new(s.clone(), t.clone()).unwrap().align(&student, &teacher).unwrap();
        let text: Spans = spans(&forth).into_iter().filter(|chunk| chunk.2 != Kind::Marker).collect();
        prop_assert_eq!(text, alone);
        prop_assert_eq!(forth.kind.iter().filter(|&&kind| kind == Kind::Marker).count(), parts.len());
        // Law 4, and law 5 with its exception.
        let back = Aligner::new(t.clone(), s.clone()).unwrap().align(&teacher, &student).unwrap();
        prop_assert_eq!((&back.teacher_ptr, &back.student_chunk), (&forth.student_ptr, &forth.teacher_chunk));
        let own = Aligner::new(t.clone(), t).unwrap().align(&teacher, &teacher).unwrap();
        prop_assert!(own.kind.iter().all(|kind| matches!(kind, Kind::OneToOne | Kind::Marker)));
        prop_assert_eq!(own.kind.iter().filter(|&&kind| kind == Kind::Marker).count(), parts.len());
    }

    #[test]
    fn stops_pair_at_the_same_place(text in bytes(), a in places(), b in places(), truncated in any::<bool>()) {
        let (mut student, mut teacher) = (cut(&text, &a), cut(&text, &b));
        teacher.extend([None, stop(), stop()]);
        if !truncated {
            student.extend([stop(), None, stop()]);
        }
        let alignment = align(&student, &teacher);
        check_shape(&alignment, &student, &teacher);
        let stops = alignment.kind.iter().filter(|&&k| k == Kind::Stop).count();
        prop_assert_eq!(stops, usize::from(!truncated));
        if !truncated {
            let g = alignment.kind.len() as i32 - 1;
            let first = student.iter().position(|t| *t == stop()).unwrap();
            prop_assert_eq!(alignment.student_chunk[first], g);
            prop_assert_eq!(alignment.teacher_chunk[teacher.iter().position(|t| *t == stop()).unwrap()], g);
            prop_assert!(alignment.student_chunk[first + 1..].iter().all(|&g| g < 0));
        }
    }
}

#[test]
fn an_id_outside_the_vocabulary_is_named() {
    let (t, _) = table(&vec![Some(b"a".to_vec())]);
    let aligner = Aligner::new(t.clone(), t).unwrap();
    let ids = [2i64, -100, 7];
    let rows = |ids| Rows::new(Ids::I64(ids), Layout::Ragged(&[0, 1, 3])).unwrap();
    let error = aligner.align_batch(rows(&ids), rows(&[2, 2, 2]), false).unwrap_err();
    assert_eq!(error, Error::TokenId { side: xtokmap::Side::Student, row: 1, position: 0, id: -100, len: 3 });
    assert!(error.to_string().starts_with("student_ids, row 1, position 0: id -100 is outside"), "{error}");
    let error = aligner.align_batch(rows(&[2, 2, 2]), rows(&[2, 2, 3]), false).unwrap_err();
    assert_eq!(error, Error::TokenId { side: xtokmap::Side::Teacher, row: 1, position: 1, id: 3, len: 3 });
}

#[test]
fn an_invalid_byte_counts_as_its_decoder_counts_it() {
    for (invalid, text) in [(Invalid::Maximal, "x\u{fffd}y"), (Invalid::Each, "x\u{fffd}\u{fffd}y")] {
        let student = vec![Some(b"x".to_vec()), Some(b"\xe4".to_vec()), Some(b"\xbd".to_vec()), Some(b"y".to_vec())];
        let teacher: Tokens = text.chars().map(|c| Some(c.to_string().into_bytes())).collect();
        let ((s, student), (t, teacher)) = (table(&student), table(&teacher));
        let alignment = Aligner::new(s.with_invalid(invalid), t).unwrap().align(&student, &teacher).unwrap();
        let rewritten = alignment.kind.iter().filter(|&&k| k == Kind::Rewritten).count();
        assert_eq!(rewritten, text.matches('\u{fffd}').count());
        assert!(alignment.student_chunk.iter().all(|&g| g >= 0), "{alignment:?}");
    }
}

#[test]
fn a_row_may_have_more_chunks_than_tokens_on_either_side() {
    // Every token is on one side only, but for the first: more chunks than the usual room.
    let said = |texts: &[&str]| texts.iter().map(|t| Some(t.as_bytes().to_vec())).collect::<Tokens>();
    let (student, teacher) = (said(&["a", "b", "c"]), said(&["▁", "a", "b", "c"]));
    let alignment = align(&student, &teacher);
    check_shape(&alignment, &student, &teacher);
    assert_eq!(alignment.kind, [Kind::Rewritten, Kind::OneToOne, Kind::OneToOne, Kind::OneToOne]);
    assert_eq!(unplaced(alignment), swapped(&align(&teacher, &student)));
}

#[test]
fn many_rows_are_split_over_threads() {
    let said = |texts: &[&str]| texts.iter().map(|t| Some(t.as_bytes().to_vec())).collect::<Tokens>();
    let ((s, a), (t, b)) = (table(&said(&["ab", "c", "d"])), table(&said(&["a", "bc", "D"])));
    let aligner = Aligner::new(s, t).unwrap();
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let cu = |row: usize| (0..=4000).map(|b| b * row as i64).collect::<Vec<i64>>();
    let (ids, others) = (a.repeat(4000), b.repeat(4000));
    let (cu_s, cu_t) = (cu(a.len()), cu(b.len()));
    let rows = |ids, cu| Rows::new(Ids::U32(ids), Layout::Ragged(cu)).unwrap();
    let of = |threads| {
        pool(threads).install(|| aligner.align_batch(rows(&ids, &cu_s), rows(&others, &cu_t), false).unwrap())
    };
    let one = of(1);
    assert_eq!(one.chunk_cu.last(), Some(&8000));
    assert_eq!(one, of(3));
    let wrong = [&others[..], &[99]].concat();
    let wrong_cu = [&cu_t[..4000], &[wrong.len() as i64]].concat();
    let error = pool(3).install(|| aligner.align_batch(rows(&ids, &cu_s), rows(&wrong, &wrong_cu), false)).unwrap_err();
    assert!(matches!(error, Error::TokenId { row: 3999, position: 3, .. }), "{error}");
}

#[test]
fn rows_that_do_not_fit_their_ids() {
    for (cu, found) in [
        (&[0, 2][..], "not from 0 to 2"),
        (&[1, 3], "not from 1 to 3"),
        (&[], "not be empty"),
        (&[0, 3, 1, 3], "but entry 2 is 1 after 3"),
    ] {
        let error = Rows::new(Ids::U32(&[0, 1, 2]), Layout::Ragged(cu)).unwrap_err();
        assert_eq!(error.to_string(), format!("cu_seqlens must rise from 0 to the number of ids (3), {found}"));
    }
}

/// Findings on real pairs: (student tokens, teacher tokens, the chunks that are right).
#[test]
fn a_prefix_space_is_not_taken_for_another_white_space() {
    type Case<'a> = (&'a [&'a str], &'a [&'a str], Spans);
    let one = |i, j| (vec![i], vec![j], Kind::OneToOne);
    let cases: Vec<Case<'_>> = vec![
        (&["\n", "x"], &[" ", "\n", "x"], vec![(vec![], vec![0], Kind::Rewritten), one(0, 1), one(1, 2)]),
        (&[" ", "\n", "x"], &["  ", "\n", "x"], vec![(vec![0], vec![0], Kind::Rewritten), one(1, 1), one(2, 2)]),
        (&["\r", "\t", "x"], &[" \r", "\t", "x"], vec![(vec![0], vec![0], Kind::Rewritten), one(1, 1), one(2, 2)]),
        (&[" ", "˘", "x"], &["  ", "˘", "x"], vec![(vec![0], vec![0], Kind::Rewritten), one(1, 1), one(2, 2)]),
        (&["\u{307}", " q"], &[" ", "\u{307}", " q"], vec![(vec![], vec![0], Kind::Rewritten), one(0, 1), one(1, 2)]),
        (&["\u{37a}", "x"], &[" ", "\u{345}", "x"], vec![(vec![0], vec![0, 1], Kind::Rewritten), one(1, 2)]),
        (&["\n", " ", "x"], &[" ", " ", "x"], vec![(vec![0], vec![0], Kind::Rewritten), one(1, 1), one(2, 2)]),
    ];
    for (student, teacher, want) in cases {
        let tokens = |side: &[&str]| side.iter().map(|t| Some(t.as_bytes().to_vec())).collect::<Tokens>();
        assert_eq!(spans(&align(&tokens(student), &tokens(teacher))), want, "{student:?} {teacher:?}");
        let back = spans(&align(&tokens(teacher), &tokens(student)));
        assert_eq!(
            back,
            want.into_iter().map(|(s, t, kind)| (t, s, kind)).collect::<Spans>(),
            "{teacher:?} {student:?}"
        );
    }
}

/// Findings of fuzzing; `None` here is an end of turn.
#[test]
fn fuzzing_found() {
    type Case<'a> = (&'a [Option<&'a [u8]>], &'a [Option<&'a [u8]>]);
    let cases: Vec<Case<'_>> = vec![
        (&[Some(b"\0")], &[Some(b" ")]),
        (&[None, Some(b"\xe8\x88"), Some(b"\x88")], &[None, Some(b"\xe8\x88"), Some(b"\xe8\x88")]),
        (&[Some(b"\xc3"), Some(b"a")], &[Some(b"\xc3"), None, Some(b"\xa9")]),
        (&[Some(b"\xc3"), None, Some(b"a"), None], &[Some(b"\xc3"), None, Some(b"\xa9")]),
    ];
    for (student, teacher) in cases {
        let tokens = |side: &[Option<&[u8]>]| {
            side.iter().map(|t| t.map_or_else(stop, |bytes| Some(bytes.to_vec()))).collect::<Tokens>()
        };
        let (student, teacher) = (tokens(student), tokens(teacher));
        let (forth, back) = (align(&student, &teacher), align(&teacher, &student));
        check_shape(&forth, &student, &teacher);
        check_shape(&back, &teacher, &student);
        assert_eq!(unplaced(forth), swapped(&back));
    }
}

#[test]
fn texts_and_offsets_that_do_not_fit() {
    assert_eq!(align_texts(&["å", "BC"], &["abc"]), (vec![vec![0], vec![0]], vec![vec![0, 1]]));
    for spans in [vec![[2, 1]], vec![[-1, 1]], vec![[0, 3], [1, 2]], vec![[0, 1 << 31]]] {
        let error = align_offsets(&spans, &[[0, 1]]).unwrap_err();
        assert!(error.to_string().starts_with("student_offsets["), "{error}");
    }
    let gaps = align_offsets(&[[0, 2], [3, 5]], &[[0, 2], [3, 4], [4, 5]]).unwrap();
    assert_eq!(overlaps(&gaps).nbytes, [2, 1, 1]);
}

#[test]
fn a_table_is_its_parts() {
    let tokens = [Some("a"), None, Some(""), Some("né")];
    let table = ByteTable::from_tokens(tokens).unwrap();
    let parts = |arena: &[u8], offsets: &[u32], special: &[bool]| {
        ByteTable::from_parts(arena.to_vec(), offsets.to_vec(), special.to_vec())
    };
    let again = parts(table.arena(), table.offsets(), table.special()).unwrap();
    assert!((0..5).all(|id| again.get(id) == table.get(id)));
    // Not rising, not to the end of the arena, a special token with bytes, another number of ids.
    for (offsets, special) in [
        (&[0, 2, 1, 3][..], &[false; 3][..]),
        (&[0, 1, 2, 2], &[false; 3]),
        (&[0, 1, 2, 3], &[false, false, true]),
        (&[0, 1, 3], &[false; 3]),
        (&[], &[]),
    ] {
        assert!(parts(b"abc", offsets, special).is_err(), "{offsets:?} {special:?}");
    }
}
