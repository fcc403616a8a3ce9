// What the page says, in five languages. {0}, {1} stand for what is filled in.

export const LANGUAGES = { en: "English", de: "Deutsch", es: "Español", fr: "Français", zh: "中文" };

const STRINGS = {
  notice: [
    "For research use only, not for diagnosis.",
    "Nur für die Forschung, nicht für die Diagnose.",
    "Solo para investigación, no para diagnóstico.",
    "Pour la recherche uniquement, pas pour le diagnostic.",
    "仅供研究使用，不用于诊断。",
  ],
  skip: ["To the question", "Zur Frage", "Ir a la pregunta", "Aller à la question", "跳到提问"],
  conversations: ["Conversations", "Gespräche", "Conversaciones", "Conversations", "对话列表"],
  conversation: ["Conversation", "Gespräch", "Conversación", "Conversation", "对话"],
  newConversation: ["New conversation", "Neues Gespräch", "Nueva conversación", "Nouvelle conversation", "新对话"],
  language: ["Language", "Sprache", "Idioma", "Langue", "语言"],
  theme: ["Light or dark", "Hell oder dunkel", "Claro u oscuro", "Clair ou sombre", "浅色或深色"],
  exportJson: ["Save as JSON", "Als JSON sichern", "Guardar como JSON", "Enregistrer en JSON", "保存为 JSON"],
  exportSr: [
    "Save as DICOM SR", "Als DICOM SR sichern", "Guardar como DICOM SR", "Enregistrer en DICOM SR", "保存为 DICOM SR",
  ],
  exportPdf: ["Print or PDF", "Drucken oder PDF", "Imprimir o PDF", "Imprimer ou PDF", "打印或 PDF"],
  forget: ["Forget this conversation", "Dieses Gespräch vergessen", "Olvidar esta conversación", "Oublier cette conversation", "删除此对话"],
  nothingWritten: [
    "All of this is in memory only. It is gone when the program ends.",
    "Alles hier liegt nur im Speicher und ist mit dem Programmende fort.",
    "Todo esto está solo en la memoria y desaparece al cerrar el programa.",
    "Tout ceci n’est qu’en mémoire et disparaît à la fin du programme.",
    "所有内容只在内存中，程序结束后即消失。",
  ],
  writtenEncrypted: [
    "Conversations are kept, encrypted with your passphrase. “Forget” deletes one for good.",
    "Gespräche werden aufbewahrt, verschlüsselt mit Ihrer Passphrase. „Vergessen“ löscht eines endgültig.",
    "Las conversaciones se guardan cifradas con su contraseña. «Olvidar» borra una para siempre.",
    "Les conversations sont conservées, chiffrées avec votre phrase secrète. « Oublier » en efface une pour de bon.",
    "对话以您的口令加密保存。“删除”会将其永久删除。",
  ],
  question: ["Question", "Frage", "Pregunta", "Question", "问题"],
  placeholder: [
    "Ask about the picture. Enter sends, Shift+Enter starts a line, Esc stops.",
    "Fragen Sie zum Bild. Enter sendet, Umschalt+Enter beginnt eine Zeile, Esc hält an.",
    "Pregunte sobre la imagen. Intro envía, Mayús+Intro abre una línea, Esc detiene.",
    "Interrogez l’image. Entrée envoie, Maj+Entrée ouvre une ligne, Échap arrête.",
    "就图像提问。Enter 发送，Shift+Enter 换行，Esc 停止。",
  ],
  ask: ["Ask", "Fragen", "Preguntar", "Demander", "提问"],
  stop: ["Stop", "Anhalten", "Detener", "Arrêter", "停止"],
  picture: ["Picture", "Bild", "Imagen", "Image", "图像"],
  pictures: ["Pictures", "Bilder", "Imágenes", "Images", "图像"],
  stageKeys: [
    "Picture. Drag or Alt+arrows: window. Wheel or + and −: zoom. Shift+drag or arrows: move. Page up and down: frame. D: dose and contours.",
    "Bild. Ziehen oder Alt+Pfeile: Fenster. Rad oder + und −: Zoom. Umschalt+Ziehen oder Pfeile: verschieben. Bild auf und ab: Einzelbild. D: Dosis und Konturen.",
    "Imagen. Arrastrar o Alt+flechas: ventana. Rueda o + y −: zoom. Mayús+arrastrar o flechas: mover. RePág y AvPág: cuadro. D: dosis y contornos.",
    "Image. Glisser ou Alt+flèches : fenêtre. Molette ou + et − : zoom. Maj+glisser ou flèches : déplacer. Page haut et bas : coupe. D : dose et contours.",
    "图像。拖动或 Alt+方向键：窗宽窗位；滚轮或 + −：缩放；Shift+拖动或方向键：移动；Page Up/Down：切换帧；D：剂量与轮廓。",
  ],
  drop: [
    "Drop or paste pictures here: DICOM (also a series, with its RTDOSE and RTSTRUCT), PNG, JPEG, TIFF",
    "Bilder hier ablegen oder einfügen: DICOM (auch eine Serie, mit RTDOSE und RTSTRUCT), PNG, JPEG, TIFF",
    "Suelte o pegue imágenes aquí: DICOM (también una serie, con RTDOSE y RTSTRUCT), PNG, JPEG, TIFF",
    "Déposez ou collez des images ici : DICOM (aussi une série, avec RTDOSE et RTSTRUCT), PNG, JPEG, TIFF",
    "将图像拖放或粘贴到此处：DICOM（也可为序列，连同 RTDOSE 和 RTSTRUCT）、PNG、JPEG、TIFF",
  ],
  addPicture: ["Add a picture", "Bild hinzufügen", "Añadir imagen", "Ajouter une image", "添加图像"],
  preset: ["Window preset", "Fenstervorgabe", "Ventana predefinida", "Fenêtre prédéfinie", "预设窗"],
  asStored: ["Window of the file", "Fenster der Datei", "Ventana del archivo", "Fenêtre du fichier", "文件自带窗"],
  own: ["Own window", "Eigenes Fenster", "Ventana propia", "Fenêtre libre", "自定义窗"],
  lung: ["Lung", "Lunge", "Pulmón", "Poumon", "肺窗"],
  bone: ["Bone", "Knochen", "Hueso", "Os", "骨窗"],
  soft: ["Soft tissue", "Weichteile", "Tejido blando", "Parties molles", "软组织窗"],
  brain: ["Brain", "Gehirn", "Cerebro", "Cerveau", "脑窗"],
  center: ["Center", "Zentrum", "Centro", "Centre", "窗位"],
  width: ["Width", "Breite", "Ancho", "Largeur", "窗宽"],
  invert: ["Invert view", "Ansicht umkehren", "Invertir vista", "Inverser la vue", "反相显示"],
  cover: [
    "Dose and contours", "Dosis und Konturen", "Dosis y contornos", "Dose et contours", "剂量与轮廓",
  ],
  legend: [
    "What lies over the picture", "Was über dem Bild liegt", "Lo que cubre la imagen", "Ce qui recouvre l’image", "图像上的叠加内容",
  ],
  noPlace: [
    "A dose or structure file waits for a picture with its frame of reference.",
    "Eine Dosis- oder Strukturdatei wartet auf ein Bild mit ihrem Bezugssystem.",
    "Un archivo de dosis o estructuras espera una imagen con su sistema de referencia.",
    "Un fichier de dose ou de structures attend une image de son repère.",
    "剂量或结构文件正在等待具有相同参考坐标系的图像。",
  ],
  textFound: [
    "Text seems to be burned into {0} picture(s). Does it name a patient?",
    "In {0} Bild(er) scheint Text eingebrannt zu sein. Nennt er einen Patienten?",
    "Parece haber texto grabado en {0} imagen(es). ¿Nombra a un paciente?",
    "Du texte semble incrusté dans {0} image(s). Nomme-t-il un patient ?",
    "{0} 幅图像中似乎嵌有文字。其中是否有患者姓名？",
  ],
  textMissed: [
    "{0} picture(s) say that text is burned into them, and none was found: look for yourself. Does it name a patient?",
    "{0} Bild(er) geben eingebrannten Text an, und keiner wurde gefunden: sehen Sie selbst nach. Nennt er einen Patienten?",
    "{0} imagen(es) declaran texto grabado y no se halló ninguno: compruébelo. ¿Nombra a un paciente?",
    "{0} image(s) déclarent du texte incrusté et aucun n’a été trouvé : vérifiez. Nomme-t-il un patient ?",
    "{0} 幅图像声明嵌有文字，但没有找到：请自行查看。其中是否有患者姓名？",
  ],
  textNote: [
    "The model reads what it is shown. Black boxes cover the text that was found; some may be missed, so look for yourself.",
    "Das Modell liest, was ihm gezeigt wird. Schwarze Felder verdecken gefundenen Text; mancher wird übersehen: sehen Sie selbst nach.",
    "El modelo lee lo que se le muestra. Los recuadros negros cubren el texto hallado; puede faltar alguno: compruébelo.",
    "Le modèle lit ce qu’on lui montre. Des cadres noirs couvrent le texte trouvé ; il peut en manquer : vérifiez.",
    "模型会读取所显示的内容。黑框遮住已找到的文字，但可能有遗漏，请自行检查。",
  ],
  blackOut: ["Black the text out", "Text schwärzen", "Tapar el texto", "Masquer le texte", "遮住文字"],
  showText: ["Show as it is", "Zeigen, wie es ist", "Mostrar tal cual", "Montrer tel quel", "原样显示"],
  leaveOut: ["Leave out", "Weglassen", "Omitir", "Laisser de côté", "不使用"],
  fit: ["Fit", "Einpassen", "Ajustar", "Ajuster", "适应窗口"],
  remove: ["Remove", "Entfernen", "Quitar", "Retirer", "移除"],
  frame: ["Frame {0} of {1}", "Bild {0} von {1}", "Cuadro {0} de {1}", "Coupe {0} sur {1}", "第 {0} 帧，共 {1} 帧"],
  modelSees: ["The model sees", "Das Modell sieht", "El modelo ve", "Le modèle voit", "模型所见"],
  seenFacts: [
    "{0} tile(s), {1} tokens, SHA-256 {2}…",
    "{0} Kachel(n), {1} Token, SHA-256 {2}…",
    "{0} tesela(s), {1} tokens, SHA-256 {2}…",
    "{0} tuile(s), {1} tokens, SHA-256 {2}…",
    "{0} 块，{1} 个 token，SHA-256 {2}…",
  ],
  willShow: [
    "{0} picture(s) go with the next question.",
    "{0} Bild(er) gehen mit der nächsten Frage.",
    "{0} imagen(es) van con la próxima pregunta.",
    "{0} image(s) accompagnent la prochaine question.",
    "下一个问题将附带 {0} 幅图像。",
  ],
  hasSeen: [
    "The model has these pictures already; a changed window or frame is shown anew.",
    "Das Modell hat diese Bilder schon; ein anderes Fenster oder Einzelbild wird neu gezeigt.",
    "El modelo ya tiene estas imágenes; otra ventana u otro cuadro se muestra de nuevo.",
    "Le modèle a déjà ces images ; une autre fenêtre ou coupe est montrée à nouveau.",
    "模型已看过这些图像；更改窗或帧后会重新显示给模型。",
  ],
  noPicture: ["No picture: the model answers from text alone.", "Kein Bild: das Modell antwortet nur aus dem Text.", "Sin imagen: el modelo responde solo por el texto.", "Sans image : le modèle répond d’après le texte seul.", "没有图像：模型仅根据文字回答。"],
  uploading: ["Reading {0} of {1}…", "Lese {0} von {1}…", "Leyendo {0} de {1}…", "Lecture {0} sur {1}…", "正在读取 {0}/{1}…"],
  waiting: ["Waiting for its turn", "Wartet, bis es an der Reihe ist", "Esperando turno", "En attente", "排队中"],
  encoding: ["Looking at the picture", "Sieht das Bild an", "Mirando la imagen", "Examine l’image", "正在查看图像"],
  reading: ["Reading the question", "Liest die Frage", "Leyendo la pregunta", "Lit la question", "正在阅读问题"],
  writing: ["Writing", "Schreibt", "Escribiendo", "Écrit", "正在作答"],
  done: ["Answered", "Beantwortet", "Respondido", "Répondu", "已回答"],
  stopped: ["Stopped", "Angehalten", "Detenido", "Arrêté", "已停止"],
  noAnswer: ["The model gave no answer.", "Das Modell gab keine Antwort.", "El modelo no dio respuesta.", "Le modèle n’a pas répondu.", "模型没有给出回答。"],
  finishStopped: ["stopped by you", "von Ihnen angehalten", "detenido por usted", "arrêté par vous", "由您停止"],
  finishLength: ["cut off by length", "wegen Länge abgeschnitten", "cortado por longitud", "coupé par la longueur", "因长度截断"],
  cannotBeTold: [
    "Open: the model says that this picture does not tell.",
    "Offen: Das Modell sagt, dass dieses Bild es nicht zeigt.",
    "Abierto: el modelo dice que esta imagen no lo muestra.",
    "Ouvert : le modèle dit que cette image ne le montre pas.",
    "未定：模型表示此图像无法说明。",
  ],
  copy: ["Copy", "Kopieren", "Copiar", "Copier", "复制"],
  copied: ["Copied", "Kopiert", "Copiado", "Copié", "已复制"],
  again: ["Another answer", "Andere Antwort", "Otra respuesta", "Autre réponse", "换个回答"],
  edit: ["Ask differently", "Anders fragen", "Preguntar de otro modo", "Demander autrement", "修改提问"],
  you: ["You", "Sie", "Usted", "Vous", "您"],
  unreleased: ["Warning: {0}", "Achtung: {0}", "Atención: {0}", "Attention : {0}", "警告：{0}"],
  howSure: [
    "sure to {0}: of {1} measured answers about as sure, {2} were right ({3} to {4}; {5})",
    "sicher zu {0}: von {1} gemessenen, etwa so sicheren Antworten stimmten {2} ({3} bis {4}; {5})",
    "seguro al {0}: de {1} respuestas medidas así de seguras, {2} eran correctas ({3} a {4}; {5})",
    "sûr à {0} : sur {1} réponses mesurées aussi sûres, {2} étaient justes ({3} à {4} ; {5})",
    "把握 {0}：在 {1} 个测得的同等把握的回答中，{2} 正确（{3} 至 {4}；{5}）",
  ],
  fidelity: [
    "{0} of tokens as before export (KLD {1}, {2} tokens)",
    "{0} der Token wie vor dem Export (KLD {1}, {2} Token)",
    "{0} de los tokens como antes de exportar (KLD {1}, {2} tokens)",
    "{0} des tokens comme avant l’export (KLD {1}, {2} tokens)",
    "{0} 的 token 与导出前一致（KLD {1}，{2} 个 token）",
  ],
  released: [
    "released: lost {0} points on {3} questions, at most {1} (budget {2})",
    "freigegeben: {0} Punkte verloren bei {3} Fragen, höchstens {1} (Budget {2})",
    "aprobado: perdió {0} puntos en {3} preguntas, como máximo {1} (límite {2})",
    "validé : {0} points perdus sur {3} questions, au plus {1} (limite {2})",
    "已放行：{3} 个问题损失 {0} 个百分点，至多 {1}（上限 {2}）",
  ],
  window: ["window {0} / {1}", "Fenster {0} / {1}", "ventana {0} / {1}", "fenêtre {0} / {1}", "窗位 {0} / 窗宽 {1}"],
  fullRange: ["full range", "voller Bereich", "rango completo", "plage entière", "全范围"],
  seed: ["seed {0}, temperature {1}", "Seed {0}, Temperatur {1}", "semilla {0}, temperatura {1}", "graine {0}, température {1}", "种子 {0}，温度 {1}"],
  timing: [
    "first word after {0} s, {1} tokens a second",
    "erstes Wort nach {0} s, {1} Token je Sekunde",
    "primera palabra tras {0} s, {1} tokens por segundo",
    "premier mot après {0} s, {1} tokens par seconde",
    "首字用时 {0} 秒，每秒 {1} 个 token",
  ],
  tokenWanted: [
    "The token from the line that ldrt-edge printed",
    "Das Token aus der Zeile, die ldrt-edge ausgab",
    "El token de la línea que mostró ldrt-edge",
    "Le jeton de la ligne affichée par ldrt-edge",
    "ldrt-edge 启动时打印的令牌",
  ],
  enter: ["Enter", "Öffnen", "Entrar", "Entrer", "进入"],
};

const CODES = Object.keys(LANGUAGES);
let place = 0;

export function choose(code) {
  place = Math.max(CODES.indexOf(code), 0);
  document.documentElement.lang = CODES[place];
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-label]")) {
    node.setAttribute("aria-label", t(node.dataset.label));
    node.title = t(node.dataset.label);
  }
  for (const node of document.querySelectorAll("[data-placeholder]")) node.placeholder = t(node.dataset.placeholder);
}

export function preferred() {
  return navigator.languages.map((name) => name.slice(0, 2)).find((name) => name in LANGUAGES) ?? "en";
}

export function t(key, ...values) {
  return values.reduce((text, value, i) => text.replace(`{${i}}`, value), STRINGS[key][place]);
}

export function number(value, digits = 1) {
  return value.toLocaleString(CODES[place], { maximumFractionDigits: digits });
}

// A grey value: HU go into the thousands, Gy into hundredths.
export function level(value) {
  return value.toLocaleString(CODES[place], { maximumSignificantDigits: 6 });
}
